//! The core alone: `Core::apply` of one publish, and of 64 in one event, by who listens.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use octobus_benches::routing::{self, Bare, TOPIC};

/// Filters that do not match.
const OTHERS: u32 = 1000;

fn live(criterion: &mut Criterion) {
    let frame = routing::frame_of_size(TOPIC, 256);
    let mut group = criterion.benchmark_group("live");
    for (burst, listeners) in [(1, 0), (1, 1), (1, 16), (64, 0), (64, 1), (64, 16)] {
        let mut core = Bare::new(OTHERS, listeners);
        group.throughput(Throughput::Elements(burst));
        group.bench_function(format!("{burst} to {listeners}"), |bencher| {
            let messages = || vec![routing::publish(&frame, 0); burst as usize];
            bencher.iter_batched(messages, |messages| core.publish(messages), BatchSize::SmallInput);
        });
    }
    group.finish();
}

fn logged(criterion: &mut Criterion) {
    let frame = routing::frame_of_size(TOPIC, 256);
    let mut group = criterion.benchmark_group("logged, durable at once");
    for (burst, listeners) in [(1, 0), (64, 0), (64, 1)] {
        let mut core = Bare::new(OTHERS, listeners);
        group.throughput(Throughput::Elements(burst));
        group.bench_function(format!("{burst} to {listeners}"), |bencher| {
            let messages = || vec![routing::publish(&frame, 1); burst as usize];
            bencher.iter_batched(messages, |messages| core.publish(messages), BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(benches, live, logged);
criterion_main!(benches);
