//! The acceptance, from the outside: real processes, stock clients, bad networks. One binary, and each
//! module is named after the hazard that it keeps away.

#![allow(clippy::unwrap_used)] // all of it is tests, also what stands beside the `#[test]` functions

mod a_backup_is_another_life;
mod a_cluster_and_its_nodes;
mod a_fleet_under_fire;
mod a_node_stays_in_its_subtree;
mod a_relay_in_between;
mod a_tier_of_hubs;
mod a_tier_that_forgets;
mod a_tier_under_fire;
mod behind_a_balancer;
mod bulk_delays_no_alarm;
mod containers;
mod first_five_minutes;
mod generic_clients;
mod histories_do_not_mix;
mod hostile_bytes;
mod kubectl;
mod logs_and_commands;
mod mqtt_sessions;
mod names_survive;
mod nothing_acknowledged_is_lost;
mod nothing_grows;
mod operations;
mod scripts_on_real_processes;
mod simulated_fleets;
mod state_reaches_its_nodes;
mod the_harness_itself;
mod the_node_answers_alone;
mod two_machines;
mod udp_is_blocked;
mod what_is_deployed_exists;
mod workloads;
