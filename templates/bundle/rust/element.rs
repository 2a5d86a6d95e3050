//! The element types of tensors, as bits: the arithmetic is the GPU's.

use crate::ffi::{gqa_dtype, GQA_BFLOAT16, GQA_FLOAT16};
use crate::stored::CacheType;

/// IEEE 754 binary16, as its bits. Laid out as `half::f16` and CUDA's `half` are.
#[allow(non_camel_case_types)]
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default)]
pub struct f16(pub u16);

/// bfloat16, the upper half of an `f32`, as its bits. Laid out as `half::bf16` and CUDA's
/// `__nv_bfloat16` are.
#[allow(non_camel_case_types)]
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default)]
pub struct bf16(pub u16);

/// An element of a cache of 8 bits, with 4 of exponent and 3 of mantissa, as its bits. Laid out as
/// CUDA's `__nv_fp8_e4m3` is.
#[allow(non_camel_case_types)]
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct f8e4m3(pub u8);

/// An element of a cache of 8 bits, the upper half of an `f16`, as its bits. Laid out as CUDA's
/// `__nv_fp8_e5m2` is.
#[allow(non_camel_case_types)]
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct f8e5m2(pub u8);

/// What tensors can consist of: `f16` or `bf16`.
pub trait Element: Output<Self> + Stored<Self> + Copy + Send + Sync + 'static {
    /// What C calls the type.
    const DTYPE: gqa_dtype;

    /// The element with these bits.
    fn from_bits(bits: u16) -> Self;

    /// The element's bits.
    fn to_bits(self) -> u16;

    /// The nearest element, of two equally near ones the even one.
    fn from_f32(value: f32) -> Self;

    /// The element's value, exactly.
    fn to_f32(self) -> f32;
}

/// What the output of a step on tensors of `T` can consist of: `T` itself, or `f32`, for outputs that
/// are not rounded ([`Config::output_float32`](crate::Config::output_float32)).
pub trait Output<T>: sealed::Sealed {
    /// Whether it is `f32`.
    const IS_FLOAT32: bool;
}

impl<T: Element> Output<T> for T {
    const IS_FLOAT32: bool = false;
}

impl Output<f16> for f32 {
    const IS_FLOAT32: bool = true;
}

impl Output<bf16> for f32 {
    const IS_FLOAT32: bool = true;
}

/// What the caches of a step on tensors of `T` can consist of: `T` itself, or elements of 8 bits
/// ([`Config::cache_type`](crate::Config::cache_type)).
pub trait Stored<T>: sealed::Sealed {
    /// Which of them it is.
    const TYPE: CacheType;
}

impl<T: Element> Stored<T> for T {
    const TYPE: CacheType = CacheType::OfQ;
}

impl Stored<f16> for f8e4m3 {
    const TYPE: CacheType = CacheType::F8E4M3;
}

impl Stored<bf16> for f8e4m3 {
    const TYPE: CacheType = CacheType::F8E4M3;
}

impl Stored<f16> for f8e5m2 {
    const TYPE: CacheType = CacheType::F8E5M2;
}

impl Stored<bf16> for f8e5m2 {
    const TYPE: CacheType = CacheType::F8E5M2;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::f16 {}
    impl Sealed for super::bf16 {}
    impl Sealed for f32 {}
    impl Sealed for super::f8e4m3 {}
    impl Sealed for super::f8e5m2 {}
}

const F32_MAGNITUDE: u32 = 0x7fff_ffff;
const F32_INFINITY: u32 = 0x7f80_0000;
const F16_EXPONENT: u32 = 0x7c00;

impl Element for f16 {
    const DTYPE: gqa_dtype = GQA_FLOAT16;

    fn from_bits(bits: u16) -> Self {
        f16(bits)
    }

    fn to_bits(self) -> u16 {
        self.0
    }

    fn from_f32(value: f32) -> Self {
        let sign = (value.to_bits() >> 16) & 0x8000;
        let magnitude = value.to_bits() & F32_MAGNITUDE;
        let rounded = if magnitude > F32_INFINITY {
            0x7e00
        } else if magnitude >= 65520f32.to_bits() {
            F16_EXPONENT // halfway between the largest number and the next
        } else if magnitude < 2f32.powi(-14).to_bits() {
            // Subnormal, a multiple of 2^-24, as are f32's numbers from 0.5 to 1: the sum rounds.
            (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()
        } else {
            let rebiased = magnitude - ((127 - 15) << 23);
            (rebiased + 0x0fff + ((rebiased >> 13) & 1)) >> 13
        };
        f16((sign | rounded) as u16)
    }

    fn to_f32(self) -> f32 {
        let sign = u32::from(self.0 & 0x8000) << 16;
        let magnitude = u32::from(self.0 & 0x7fff);
        let widened = if magnitude >= F16_EXPONENT {
            F32_INFINITY | (magnitude << 13)
        } else {
            (f32::from_bits(magnitude << 13) * 2f32.powi(127 - 15)).to_bits()
        };
        f32::from_bits(sign | widened)
    }
}

impl Element for bf16 {
    const DTYPE: gqa_dtype = GQA_BFLOAT16;

    fn from_bits(bits: u16) -> Self {
        bf16(bits)
    }

    fn to_bits(self) -> u16 {
        self.0
    }

    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = if value.is_nan() {
            bits | 0x0040_0000 // still no infinity when the lower half is gone
        } else {
            bits + 0x7fff + ((bits >> 16) & 1)
        };
        bf16((rounded >> 16) as u16)
    }

    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bit pattern comes back, and halfway between neighbours goes to the even one.
    fn check<T: Element>(infinity: u16) {
        for bits in 0..=u16::MAX {
            let value = T::from_bits(bits).to_f32();
            if value.is_nan() {
                assert!(T::from_f32(value).to_f32().is_nan(), "{bits:#x}");
            } else {
                assert_eq!(T::from_f32(value).to_bits(), bits);
            }
        }
        for bits in 0..infinity - 1 {
            let [below, above] = [bits, bits + 1].map(|it| T::from_bits(it).to_f32());
            let halfway = below + (above - below) / 2.0;
            assert_eq!(T::from_f32(halfway).to_bits(), bits + bits % 2);
            assert_eq!(T::from_f32(-halfway).to_bits(), 0x8000 | (bits + bits % 2));
            assert_eq!(
                T::from_f32(f32::from_bits(halfway.to_bits() - 1)).to_bits(),
                bits
            );
            assert_eq!(
                T::from_f32(f32::from_bits(halfway.to_bits() + 1)).to_bits(),
                bits + 1
            );
        }
        assert_eq!(T::from_f32(f32::MAX).to_bits(), infinity);
    }

    #[test]
    fn every_f16_converts_there_and_back() {
        check::<f16>(0x7c00);
        assert_eq!(f16::from_f32(1.0).0, 0x3c00);
        assert_eq!(f16::from_f32(-65504.0).0, 0xfbff);
        assert_eq!(f16::from_f32(65519.99).0, 0x7bff);
        assert_eq!(f16::from_f32(65520.0).0, 0x7c00);
        assert_eq!(f16(1).to_f32(), 2f32.powi(-24));
    }

    #[test]
    fn every_bf16_converts_there_and_back() {
        check::<bf16>(0x7f80);
        assert_eq!(bf16::from_f32(1.0).0, 0x3f80);
        assert_eq!(bf16::from_f32(f32::from_bits(0x7f80_0001)).0, 0x7fc0);
    }
}
