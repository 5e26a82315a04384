//! `octobus init`: makes a Kubernetes cluster ready for a hub.

use cloudhub::bridge::{
    access,
    init::{Administrator, InitError},
};

use crate::{
    cli::InitArgs,
    exit::{Failure, Outcome},
    output,
};

pub(crate) async fn run(args: &InitArgs) -> Outcome {
    if args.print {
        return output::bytes(access::manifest().as_bytes());
    }
    let Some(kubeconfig) = &args.kubeconfig else {
        return Err(Failure::usage(
            "name the cluster with --kubeconfig FILE, or see what it needs with --print",
        ));
    };
    let cluster = Administrator::open(kubeconfig).await.map_err(failure)?;
    for line in cluster.apply().await.map_err(failure)? {
        output::line(format!("applied {line}").as_bytes())?;
    }
    match &args.out {
        Some(path) => {
            let until = cluster.write_kubeconfig(path).await.map_err(failure)?;
            let path = path.display();
            output::line(format!("wrote {path}, good until {until}").as_bytes())?;
            output::line(format!("start the hub with: octobus cloud --kubeconfig {path}").as_bytes())
        }
        None => {
            let (account, namespace) = (access::ACCOUNT, access::NAMESPACE);
            output::line(
                format!("start the hub in the cluster, as account {account} of namespace {namespace}, with: octobus cloud --kubeconfig in-cluster")
                    .as_bytes(),
            )?;
            output::line(
                b"or elsewhere: octobus init again with --out FILE, and octobus cloud --kubeconfig FILE",
            )
        }
    }
}

fn failure(error: InitError) -> Failure {
    match &error {
        InitError::Kubeconfig { .. } => Failure::usage(error),
        _ => Failure::failed(error),
    }
}
