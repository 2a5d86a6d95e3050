//! The step itself, on a GPU, compared with attention in double precision on the CPU. Passes with a
//! printed reason where there is no GPU, or none that the library was exported for.

mod common;

use std::sync::{Arc, Mutex};
use std::thread;

use common::gpu::{Buffer, Gpu};
use common::kernels::{kinds, Kind};
use common::step::{allowed, bits, worst_error, Tensors, TensorsOnGpu};
use gqa_attention_decode::{
    bf16, decode, decode_ragged, f16, prepare, set_log_callback, workspace_size, CacheStrides,
    Config, Element, GqaError, Lse, RowStrides, Stream, Strides, Workspace,
};

/// The GPU, if the library can use it.
fn usable_gpu() -> Option<Gpu> {
    let Some(kind) = kinds().first().copied() else {
        println!("skipped: no kernel without features was exported");
        return None;
    };
    let usable = Gpu::open().and_then(|gpu| match prepare::<f16>(&kind.config(1, 1, 64)) {
        Err(GqaError::Device(message) | GqaError::NoDriver(message)) => Err(message),
        _ => Ok(gpu),
    });
    usable.map_err(|reason| println!("skipped: {reason}")).ok()
}

/// Calls one of two functions of the element type.
macro_rules! with_type {
    ($kind:expr, $function:ident($($argument:expr),*)) => {
        match $kind.bf16 {
            true => $function::<bf16>($($argument),*),
            false => $function::<f16>($($argument),*),
        }
    };
}

/// Batches and caches: one block per head, splits or clusters, and ragged batches dealt out.
const SHAPES: [(usize, usize, usize); 4] = [(3, 2, 40), (2, 1, 700), (1, 2, 4096), (4, 1, 4500)];

/// Every shape of every kind that this GPU has a kernel for.
fn configs() -> Vec<(Kind, Config<'static>)> {
    let shapes = |kind: Kind| {
        SHAPES
            .map(|(batch, kv_heads, max_seq_len)| (kind, kind.config(batch, kv_heads, max_seq_len)))
    };
    let all: Vec<_> = kinds().into_iter().flat_map(shapes).collect();
    let supported =
        |(kind, config): &(Kind, Config<'static>)| match with_type!(kind, prepare(config)) {
            Ok(()) => true,
            Err(GqaError::Unsupported(message)) => {
                println!("left out: {message}"); // one schedule was exported
                false
            }
            Err(error) => panic!("{error}"),
        };
    let configs: Vec<_> = all.into_iter().filter(supported).collect();
    assert!(!configs.is_empty());
    configs
}

/// A workspace that every configuration can use.
fn workspace(gpu: &Gpu) -> Buffer<'_, u8> {
    let sizes = configs()
        .into_iter()
        .map(|(kind, config)| with_type!(kind, workspace_size(&config)));
    gpu.copy(&vec![0; sizes.map(Result::unwrap).max().unwrap()])
}

fn launch<T: Element>(
    config: &Config,
    tensors: &mut TensorsOnGpu<'_, T>,
    workspace: &mut Workspace<'_>,
    stream: Stream,
) -> Result<(), GqaError> {
    decode(
        config,
        &mut tensors.output.view_mut(),
        tensors.q.view(),
        tensors.k.view(),
        tensors.v.view(),
        &mut tensors.kv_cache_k.view_mut(),
        &mut tensors.kv_cache_v.view_mut(),
        workspace,
        stream,
    )
}

fn launch_ragged<T: Element>(
    config: &Config,
    tensors: &mut TensorsOnGpu<'_, T>,
    lengths: &Buffer<'_, i32>,
    overflow: &mut Buffer<'_, i32>,
    workspace: &mut Workspace<'_>,
) -> Result<(), GqaError> {
    decode_ragged(
        config,
        &mut tensors.output.view_mut(),
        tensors.q.view(),
        tensors.k.view(),
        tensors.v.view(),
        &mut tensors.kv_cache_k.view_mut(),
        &mut tensors.kv_cache_v.view_mut(),
        lengths.view(),
        &mut overflow.view_mut(),
        workspace,
        Stream::DEFAULT,
    )
}

/// Output, and both caches to the bit.
fn check<T: Element>(
    config: &Config,
    before: &Tensors<T>,
    after: &TensorsOnGpu<'_, T>,
    lengths: &[usize],
) {
    let error = worst_error(&after.output.read(), &before.attend(config, lengths));
    assert!(
        error <= allowed::<T>(),
        "error {error} of {config:?}, lengths {lengths:?}"
    );
    for (before, token, after) in [
        (&before.kv_cache_k, &before.k, after.kv_cache_k.read()),
        (&before.kv_cache_v, &before.v, after.kv_cache_v.read()),
    ] {
        let expected = Tensors::appended(config, before, token, lengths);
        assert!(
            bits(&after) == bits(&expected),
            "cache of {config:?}, lengths {lengths:?}"
        );
    }
}

fn decode_once<T: Element>(
    gpu: &Gpu,
    config: &Config,
    workspace: &mut Workspace<'_>,
    stream: Stream,
) {
    let before = Tensors::<T>::make(config);
    let mut tensors = before.on(gpu);
    launch(config, &mut tensors, workspace, stream).unwrap();
    check(
        config,
        &before,
        &tensors,
        &vec![config.cache_len; config.batch_size],
    );
}

#[test]
fn every_length_decodes() {
    let gpu = match usable_gpu() {
        Some(gpu) => gpu,
        None => return,
    };
    let mut memory = workspace(&gpu);
    // SAFETY: it is zeroed, and all is on one stream.
    let mut workspace = unsafe { memory.workspace() };
    for (kind, config) in configs() {
        for cache_len in [0, 1, 10, config.max_seq_len / 2, config.max_seq_len - 1] {
            let config = Config {
                cache_len,
                ..config
            };
            with_type!(
                kind,
                decode_once(&gpu, &config, &mut workspace, Stream::DEFAULT)
            );
        }
        // Weights that differ widely.
        let config = Config {
            cache_len: 30,
            scale: 0.7,
            ..config
        };
        with_type!(
            kind,
            decode_once(&gpu, &config, &mut workspace, gpu.stream())
        );
    }
}

#[test]
fn a_full_cache_is_an_error_and_stays_as_it_is() {
    let gpu = match usable_gpu() {
        Some(gpu) => gpu,
        None => return,
    };
    for (kind, config) in configs() {
        with_type!(
            kind,
            overflow_once(
                &gpu,
                &Config {
                    cache_len: config.max_seq_len,
                    ..config
                }
            )
        );
    }
}

fn overflow_once<T: Element>(gpu: &Gpu, config: &Config) {
    let before = Tensors::<T>::make(config);
    let mut tensors = before.on(gpu);
    let result = launch(
        config,
        &mut tensors,
        &mut Workspace::none(),
        Stream::DEFAULT,
    );
    assert!(
        matches!(result, Err(GqaError::CacheOverflow(_))),
        "{result:?}"
    );
    assert!(bits(&tensors.kv_cache_k.read()) == bits(&before.kv_cache_k));
    assert!(bits(&tensors.kv_cache_v.read()) == bits(&before.kv_cache_v));
    assert!(tensors.output.read().iter().all(|it| it.to_bits() == 0));
}

#[test]
fn ragged_batches_decode_and_one_overflows_alone() {
    let gpu = match usable_gpu() {
        Some(gpu) => gpu,
        None => return,
    };
    let mut memory = workspace(&gpu);
    // SAFETY: it is zeroed, and all is on one stream.
    let mut workspace = unsafe { memory.workspace() };
    for (kind, config) in configs() {
        let full = config.max_seq_len;
        let lengths: Vec<usize> = [full - 1, 0, full / 3, 7][..config.batch_size].to_vec();
        with_type!(
            kind,
            ragged_once(&gpu, &config, &lengths, 0, &mut workspace)
        );
        let last = config.batch_size - 1;
        for wrong in [full, i32::MAX as usize, usize::MAX] {
            let mut lengths = lengths.clone();
            lengths[last] = wrong; // usize::MAX: -1 on the GPU
            with_type!(
                kind,
                ragged_once(&gpu, &config, &lengths, 1 + last, &mut workspace)
            );
        }
    }
}

fn ragged_once<T: Element>(
    gpu: &Gpu,
    config: &Config,
    lengths: &[usize],
    overflows: usize,
    workspace: &mut Workspace<'_>,
) {
    let before = Tensors::<T>::make(config);
    let mut tensors = before.on(gpu);
    let on_gpu: Vec<i32> = lengths.iter().map(|it| *it as i32).collect();
    let (on_gpu, mut overflow) = (gpu.copy(&on_gpu), gpu.copy(&[0]));
    launch_ragged(config, &mut tensors, &on_gpu, &mut overflow, workspace).unwrap();
    check(config, &before, &tensors, lengths);
    assert_eq!(
        overflow.read(),
        [overflows as i32],
        "{config:?}, lengths {lengths:?}"
    );
}

#[test]
fn strides_give_the_same_bits_and_lse() {
    let gpu = match usable_gpu() {
        Some(gpu) => gpu,
        None => return,
    };
    let mut memory = workspace(&gpu);
    // SAFETY: it is zeroed, and all is on one stream.
    let mut workspace = unsafe { memory.workspace() };
    for (kind, config) in configs() {
        let config = Config {
            cache_len: config.max_seq_len / 2,
            ..config
        };
        with_type!(kind, strided_once(&gpu, &config, &mut workspace));
    }
}

/// Heads before tokens in the caches, and queries a row apart.
fn strided_once<T: Element>(gpu: &Gpu, config: &Config, workspace: &mut Workspace<'_>) {
    let packed = Tensors::<T>::make(config);
    let query = config.num_q_heads * config.head_dim;
    let mut turned = Tensors::<T>::make(config);
    turned.kv_cache_k = heads_first(config, &packed.kv_cache_k);
    turned.kv_cache_v = heads_first(config, &packed.kv_cache_v);
    turned.q = packed
        .q
        .chunks(query)
        .flat_map(|row| [row, row].concat())
        .collect();
    let cache = CacheStrides {
        token: config.head_dim,
        head: config.max_seq_len * config.head_dim,
        ..CacheStrides::PACKED
    };
    let strides = Strides {
        q: RowStrides {
            batch: 2 * query,
            head: 0,
        },
        kv_cache_k: cache,
        kv_cache_v: cache,
        ..Strides::PACKED
    };
    let found = [(&packed, Strides::PACKED), (&turned, strides)].map(|(before, strides)| {
        let mut tensors = before.on(gpu);
        tensors.output = gpu.copy(&vec![T::from_bits(0); packed.q.len()]);
        let mut lse = gpu.copy(&vec![f32::NAN; config.batch_size * config.num_q_heads]);
        // SAFETY: all is on one stream.
        let lse_view = Some(unsafe { Lse::new(lse.view_mut()) });
        let config = Config {
            lse: lse_view,
            strides,
            ..*config
        };
        launch(&config, &mut tensors, workspace, Stream::DEFAULT).unwrap();
        let lse: Vec<u32> = lse.read().iter().map(|it| it.to_bits()).collect();
        (tensors, lse)
    });
    let [(packed, packed_lse), (turned, turned_lse)] = found;
    assert!(bits(&packed.output.read()) == bits(&turned.output.read()));
    assert!(packed_lse == turned_lse);
    assert!(packed_lse.iter().all(|it| f32::from_bits(*it).is_finite()));
    for (before, after) in [
        (packed.kv_cache_k.read(), turned.kv_cache_k.read()),
        (packed.kv_cache_v.read(), turned.kv_cache_v.read()),
    ] {
        assert!(bits(&heads_first(config, &before)) == bits(&after));
    }
}

/// A cache with its tokens and heads exchanged.
fn heads_first<T: Element>(config: &Config, cache: &[T]) -> Vec<T> {
    let (tokens, heads, dim) = (config.max_seq_len, config.num_kv_heads, config.head_dim);
    let mut turned = cache.to_vec();
    for (i, row) in cache.chunks(dim).enumerate() {
        let (b, t, h) = (i / (tokens * heads), i / heads % tokens, i % heads);
        let at = ((b * heads + h) * tokens + t) * dim;
        turned[at..at + dim].copy_from_slice(row);
    }
    turned
}

#[test]
fn a_workspace_that_is_missing_too_small_or_misaligned_is_an_error() {
    let gpu = match usable_gpu() {
        Some(gpu) => gpu,
        None => return,
    };
    for (kind, config) in configs() {
        with_type!(kind, starve(&gpu, &config));
    }
}

fn starve<T: Element>(gpu: &Gpu, config: &Config) {
    let mut tensors = Tensors::<T>::make(config).on(gpu);
    let mut memory = gpu.copy(&vec![0; workspace_size::<T>(config).unwrap() + 16]);
    let end = memory.view().len();
    let results = [(0, 0), (0, 16), (1, end)].map(|(from, to)| {
        let mut view = memory.view_mut();
        // SAFETY: it is zeroed, and all is on one stream.
        let mut workspace = unsafe { Workspace::new(view.slice_mut(from..to).unwrap()) };
        launch(config, &mut tensors, &mut workspace, Stream::DEFAULT)
    });
    // Not every launch wants one, but each of these is as good as none.
    let says = [
        "workspace: got 0 bytes",
        "workspace: got 16 bytes",
        "workspace: got address",
    ];
    for (result, says) in results.iter().zip(says) {
        match result {
            Err(GqaError::Workspace(message)) => assert!(message.starts_with(says), "{message}"),
            other => assert_eq!(other, &Ok(())),
        }
        assert_eq!(result.is_ok(), results[0].is_ok());
    }
}

#[test]
fn a_launch_is_logged() {
    let gpu = match usable_gpu() {
        Some(gpu) => gpu,
        None => return,
    };
    let mut memory = workspace(&gpu);
    // SAFETY: it is zeroed, and all is on one stream.
    let mut workspace = unsafe { memory.workspace() };
    let (kind, config) = configs()[0];
    let lines = Arc::new(Mutex::new(Vec::new()));
    let received = Arc::clone(&lines);
    let this_thread = thread::current().id(); // other tests launch at the same time
    set_log_callback(Some(Box::new(move |line| {
        if thread::current().id() == this_thread {
            received.lock().unwrap().push(line.to_string());
        }
    })));
    let config = Config {
        cache_len: 10,
        ..config
    };
    with_type!(
        kind,
        decode_once(&gpu, &config, &mut workspace, Stream::DEFAULT)
    );
    set_log_callback(None);
    with_type!(
        kind,
        decode_once(&gpu, &config, &mut workspace, Stream::DEFAULT)
    );
    let lines = lines.lock().unwrap();
    assert_eq!(lines.len(), 1);
    for part in [
        "launch kernel=gqa_decode_".to_string(),
        format!("_d{}_g{}_", kind.head_dim, kind.group_size),
        format!(
            "batch_size={} num_q_heads={}",
            config.batch_size, config.num_q_heads
        ),
        "cache_seqlens=10 ".to_string(),
    ] {
        assert!(lines[0].contains(&part), "{} lacks {part}", lines[0]);
    }
}
