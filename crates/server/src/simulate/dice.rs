//! Random numbers of a simulated fleet. `fleet`, `patterns` and `runs` draw them. The same seed gives the same numbers on
//! every machine and in every version: PCG's stream is fixed, and only integers, additions and multiplications follow.

use rand_pcg::{Pcg64, rand_core::Rng};

/// What numbers are drawn for. Each subject has a stream of its own, so that drawing more for one changes no other.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
pub(super) enum Subject {
    GroupSizes = 1,
    Region = 2,
    School = 3,
    Device = 4,
    Runs = 5,
}

/// One stream of random numbers.
#[derive(Debug, Clone)]
pub(super) struct Dice(Pcg64);

impl Dice {
    /// The stream of one subject, such as the device with this number.
    pub(super) fn new(seed: u64, subject: Subject, number: u64) -> Self {
        let state = u128::from(mixed(seed)) << 64 | u128::from(mixed(number ^ mixed(seed)));
        let stream = u128::from(mixed(number)) << 8 | u128::from(subject as u64);
        Self(Pcg64::new(state, stream))
    }

    /// A number below `bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        let product = u128::from(self.0.next_u64()) * u128::from(bound);
        u64::try_from(product >> 64).unwrap_or_default()
    }

    /// A number from `least` to `most`.
    pub(super) fn between(&mut self, least: i64, most: i64) -> i64 {
        let width = most.saturating_sub(least).max(0).unsigned_abs();
        least.saturating_add_unsigned(self.below(width + 1))
    }

    /// True in so many of a thousand cases.
    pub(super) fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1_000) < per_mille
    }

    /// From 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit a double")]
    fn fraction(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Normally distributed around 0 with a deviation of 1, near enough: the sum of twelve numbers between 0 and 1,
    /// minus 6. A logarithm would not give the same bits on every machine.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.fraction()).sum::<f64>() - 6.0
    }

    /// Log-normally distributed around `median`. One number in six is more than 2 to the power of `octaves` larger.
    pub(super) fn log_normal(&mut self, median: f64, octaves: f64) -> f64 {
        median * power_of_two(self.normal() * octaves)
    }
}

/// Two to the power of `exponent`. The remainder's series is exact to five digits, which is plenty here.
fn power_of_two(exponent: f64) -> f64 {
    let mut whole = 0;
    let mut rest = exponent.clamp(-60.0, 60.0);
    while rest < 0.0 {
        rest += 1.0;
        whole -= 1;
    }
    while rest >= 1.0 {
        rest -= 1.0;
        whole += 1;
    }
    let mut result = 1.0
        + rest
            * (std::f64::consts::LN_2 + rest * (0.240_226 + rest * (0.055_504 + rest * 0.011_123)));
    for _ in 0..i32::abs(whole) {
        result *= if whole > 0 { 2.0 } else { 0.5 };
    }
    result
}

/// Spreads the bits of a number (the finalizer of SplitMix64), so that neighbouring seeds have nothing in common.
fn mixed(number: u64) -> u64 {
    let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A changed stream would silently send other fleets for the seeds that people wrote down.
    #[test]
    fn the_stream_of_a_seed_is_fixed() {
        let mut dice = Dice::new(42, Subject::Device, 7);
        let drawn: Vec<_> = (0..4).map(|_| dice.below(1_000_000)).collect();
        assert_eq!(drawn, [706_265, 312_198, 65_847, 849_688]);
        let mut other = Dice::new(42, Subject::Runs, 7);
        assert_ne!(other.below(1_000_000), drawn[0]);
    }

    #[test]
    fn numbers_are_spread_as_they_should_be() {
        let mut dice = Dice::new(1, Subject::School, 0);
        let mut counts = [0_u32; 10];
        let (mut small, mut large) = (0, 0);
        for _ in 0..10_000 {
            counts[usize::try_from(dice.between(0, 9)).unwrap()] += 1;
            let size = dice.log_normal(100.0, 1.0);
            small += u32::from(size < 50.0);
            large += u32::from(size > 200.0);
        }
        assert!(counts.iter().all(|count| (850..1_150).contains(count)), "{counts:?}");
        // 15.9 % lie beyond one deviation.
        assert!((1_400..1_800).contains(&small), "{small}");
        assert!((1_400..1_800).contains(&large), "{large}");
    }

    #[test]
    fn powers_are_near_enough() {
        for exponent in [-7.3, -1.0, -0.1, 0.0, 0.5, 0.999, 1.0, 4.7] {
            let (found, exact) = (power_of_two(exponent), exponent.exp2());
            assert!((found / exact - 1.0).abs() < 1e-4, "{exponent}: {found} {exact}");
        }
    }
}
