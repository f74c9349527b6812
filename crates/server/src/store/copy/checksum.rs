//! Compares copied rows by a checksum that does not depend on their order. `run` calls it for both sides. Two equal
//! rows must not cancel each other out.

use sha2::{Digest, Sha256};

use super::tables::{Column, Kind, Row, Value};

/// Cuts times to the precision of the destination, as the server does with the times that it shows.
pub(super) fn cut_times(row: &mut Row, columns: &[&Column], step: i64) {
    for (value, column) in row.iter_mut().zip(columns) {
        if let (Value::Integer(time), Kind::Time) = (value, column.kind) {
            *time = time.saturating_sub(time.rem_euclid(step));
        }
    }
}

/// The checksum of a table's rows, in any order: the number of rows, and the sum of their SHA-256 digests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Checksum {
    pub(super) rows: u64,
    sum: u128,
}

impl Checksum {
    pub(super) fn add(&mut self, row: &[Value]) {
        let mut hasher = Sha256::new();
        let mut bytes = |tag: u8, bytes: &[u8]| {
            hasher.update([tag]);
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for value in row {
            match value {
                Value::Null => bytes(0, &[]),
                Value::Integer(number) => bytes(1, &number.to_le_bytes()),
                Value::Text(text) => bytes(2, text.as_bytes()),
                Value::Bytes(blob) => bytes(3, blob),
            }
        }
        let digest = hasher.finalize();
        let mut half = [0; 16];
        half.iter_mut().zip(digest.iter()).for_each(|(to, from)| *to = *from);
        self.rows += 1;
        self.sum = self.sum.wrapping_add(u128::from_le_bytes(half));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::copy::tables::column;

    #[test]
    fn rows_count_whatever_their_order_and_each_value_counts() {
        let checksum = |rows: &[Row]| {
            let mut checksum = Checksum::default();
            rows.iter().for_each(|row| checksum.add(row));
            checksum
        };
        let row = |left: &str, right: &str| {
            vec![Value::Text(left.to_owned()), Value::Text(right.to_owned())]
        };
        let (one, two) = (row("a", "bc"), row("ab", "c"));
        assert_eq!(checksum(&[one.clone(), two.clone()]), checksum(&[two.clone(), one.clone()]));
        assert_ne!(checksum(std::slice::from_ref(&one)), checksum(&[two]));
        // Two equal rows do not cancel each other out.
        assert_ne!(checksum(&[one.clone(), one.clone()]).sum, checksum(&[]).sum);
        let with = |value| checksum(&[vec![value]]).sum;
        let values = [
            with(Value::Null),
            with(Value::Integer(0)),
            with(Value::Text("\0".repeat(8))),
            with(Value::Bytes(vec![0; 8])),
        ];
        for (position, value) in values.iter().enumerate() {
            assert!(!values[..position].contains(value), "{position}");
        }
    }

    #[test]
    fn times_are_cut_towards_the_past() {
        let columns = [&column("timestamp", Kind::Time), &column("id", Kind::Integer)];
        let cut = |time: i64, step: i64| {
            let mut row = vec![Value::Integer(time), Value::Integer(1_999)];
            cut_times(&mut row, &columns, step);
            assert_eq!(row[1], Value::Integer(1_999));
            row.swap_remove(0)
        };
        assert_eq!(cut(1_999, 1_000), Value::Integer(1_000));
        assert_eq!(cut(-1, 1_000), Value::Integer(-1_000));
        assert_eq!(cut(1_999, 1), Value::Integer(1_999));
    }
}
