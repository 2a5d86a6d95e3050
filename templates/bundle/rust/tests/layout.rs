//! The bindings are the header's: layouts and constants as the C compiler has them, functions and
//! their parameters as they are written there.

#![allow(non_camel_case_types)] // names are the header's

use std::ffi::CStr;
use std::mem::{align_of, size_of, MaybeUninit};
use std::os::raw::{c_char, c_longlong};
use std::ptr::addr_of;
use std::slice;

use gqa_attention_decode::ffi::*;
use gqa_attention_decode::{bf16, f16};

type Fact = (String, i64);

#[repr(C)]
struct CFact {
    name: *const c_char,
    value: c_longlong,
}

#[link(name = "gqa_layout", kind = "static")]
extern "C" {
    #[link_name = "gqa_facts"]
    static C_FACTS: CFact;
    #[link_name = "gqa_num_facts"]
    static NUM_C_FACTS: usize;
}

/// What layout.c found.
fn c_facts() -> Vec<Fact> {
    // SAFETY: layout.c defines an array of this many, with names that end with a zero.
    unsafe {
        slice::from_raw_parts(addr_of!(C_FACTS), NUM_C_FACTS)
            .iter()
            .map(|fact| {
                (
                    CStr::from_ptr(fact.name).to_str().unwrap().to_string(),
                    fact.value,
                )
            })
            .collect()
    }
}

fn fact(name: String, value: usize) -> Fact {
    (name, value.try_into().unwrap())
}

macro_rules! layout {
    ($facts:ident, $type:ident $(, $field:ident)*) => {
        $facts.push(fact(format!("{} size", stringify!($type)), size_of::<$type>()));
        $facts.push(fact(format!("{} alignment", stringify!($type)), align_of::<$type>()));
        $(
            let place = MaybeUninit::<$type>::uninit();
            let start = place.as_ptr();
            // SAFETY: the field is not read.
            let offset = unsafe { addr_of!((*start).$field) as usize } - start as usize;
            let name = concat!(stringify!($type), ".", stringify!($field));
            $facts.push(fact(name.to_string(), offset));
        )*
    };
}

macro_rules! constants {
    ($facts:ident $(, $constant:ident)*) => {
        $($facts.push((stringify!($constant).to_string(), $constant.into()));)*
    };
}

type gqa_stream_t = cudaStream_t;

include!("layout_facts.rs");

#[test]
fn layouts_and_constants_are_those_of_c() {
    assert_eq!(rust_facts(), c_facts());
}

#[test]
fn the_six_sizes_follow_the_struct_size_in_order() {
    let sizes = [
        "batch_size",
        "cache_len",
        "num_q_heads",
        "num_kv_heads",
        "head_dim",
        "scale",
    ];
    let facts = rust_facts();
    for (i, field) in sizes.iter().enumerate() {
        assert!(
            facts.contains(&(format!("GQADecodeConfig.{field}"), 8 + 4 * i as i64)),
            "{field}"
        );
    }
}

#[test]
fn elements_are_laid_out_as_their_bits() {
    assert_eq!((size_of::<f16>(), align_of::<f16>()), (2, 2));
    assert_eq!((size_of::<bf16>(), align_of::<bf16>()), (2, 2));
}

type Function = (String, Vec<String>);

/// Functions declared in a text: their names, and those of their parameters.
fn functions(text: &str, mark: &str, parameter: fn(&str) -> &str) -> Vec<Function> {
    let code = text.lines().filter(|line| !line.starts_with('#'));
    let code: Vec<&str> = code.map(|line| line.split("//").next().unwrap()).collect();
    let mut found: Vec<Function> = code
        .join(" ")
        .split(mark)
        .skip(1)
        .map(|rest| {
            let (head, tail) = rest.split_once('(').unwrap();
            let parameters = tail.split_once(')').unwrap().0.split(',').map(str::trim);
            let parameters = parameters.filter(|it| !it.is_empty() && *it != "void");
            let names = parameters.map(|it| parameter(it).to_string()).collect();
            (last_word(head).to_string(), names)
        })
        .collect();
    found.sort();
    found
}

fn last_word(text: &str) -> &str {
    text.rsplit([' ', '*']).next().unwrap()
}

fn before_colon(text: &str) -> &str {
    text.split(':').next().unwrap()
}

#[test]
fn functions_have_the_headers_names_and_parameters() {
    let header = include_str!("../../include/gqa_attention_decode.h");
    let in_c = functions(header, "GQA_API ", last_word);
    assert_eq!(in_c.len(), header.matches("\nGQA_API ").count());
    assert!(in_c.len() >= 10);
    assert_eq!(
        functions(include_str!("../ffi.rs"), "pub fn ", before_colon),
        in_c
    );
}
