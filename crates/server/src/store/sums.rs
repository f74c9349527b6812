//! The sums of events. The tables `device_jobs`, `device_days` and `fleet_hours` have a column for each. Both stores
//! build their statements from this list, and read and write rows in its order. It must stay the only list of them.

use pisync_core::JobFigures;

use super::Figures;

/// Makes [`Sums`] from the list of its columns. It also makes the conversions from and to structs that have fields of
/// the same names.
macro_rules! sums {
    ($($(#[$doc:meta])* $column:ident,)+) => {
        /// The sums of some events.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Sums {
            $($(#[$doc])* pub $column: i64,)+
        }

        impl Sums {
            /// The names of the columns.
            pub(super) const COLUMNS: [&'static str; [$(stringify!($column)),+].len()] =
                [$(stringify!($column)),+];

            /// The values, in the order of the columns.
            pub(super) fn values(&self) -> [i64; Self::COUNT] {
                [$(self.$column),+]
            }

            /// Reads sums. `read` reads the column with the given number, from 0 on.
            pub(super) fn read<E>(
                mut column: impl FnMut(usize) -> Result<i64, E>,
            ) -> Result<Self, E> {
                let mut columns = 0..;
                let mut next = || column(columns.next().unwrap_or_default());
                Ok(Self { $($column: next()?),+ })
            }

            /// Adds other sums. Foreign SQL may have written values that do not fit; the sum then stays at the limit.
            pub(super) fn add(&mut self, other: &Self) {
                $(self.$column = self.$column.saturating_add(other.$column);)+
            }

            /// The sums of a job.
            pub(super) fn of(figures: &JobFigures) -> Self {
                Self { $($column: figures.$column),+ }
            }

            /// Replaces a job's sums with these.
            pub(super) fn put_into(&self, figures: &mut JobFigures) {
                $(figures.$column = self.$column;)+
            }
        }

        impl From<Sums> for Figures {
            /// The times and the streak stay empty.
            fn from(sums: Sums) -> Self {
                Self { $($column: sums.$column,)+ ..Self::default() }
            }
        }
    };
}

sums! {
    /// Syncs reported.
    total_syncs,
    /// Syncs with errors.
    failed_syncs,
    /// Sum of files.
    total_files_synced,
    /// Sum of errors.
    total_errors,
    /// Sum of the measured speeds, hundredths of Mbps.
    speed_sum,
    /// How many syncs measured one.
    speed_count,
}

impl Sums {
    /// The number of columns.
    pub(super) const COUNT: usize = Self::COLUMNS.len();

    /// SQL that applies `expression` to each column, with commas between.
    pub(super) fn sql(expression: impl Fn(&str) -> String) -> String {
        Self::COLUMNS.map(expression).join(", ")
    }

    /// The names of the columns, with commas between.
    pub(super) fn names() -> String {
        Self::COLUMNS.join(", ")
    }

    /// The names of the columns with a minus sign, with commas between.
    pub(super) fn negative() -> String {
        Self::sql(|column| format!("-{column}"))
    }

    /// The end of an upsert that adds to the sums of an existing row. The statement calls the table `stored`.
    pub(super) fn add_to(stored: &str) -> String {
        Self::sql(|column| format!("{column} = {stored}.{column} + excluded.{column}"))
    }

    /// Each value with the name of its column.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, i64)> {
        Self::COLUMNS.into_iter().zip(self.values())
    }

    /// Whether these can be the sums of the events that are `left` and of other events.
    pub(super) fn hold(&self, left: &Self) -> bool {
        self.values().iter().zip(left.values()).all(|(sum, left)| *sum >= left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_and_written_in_the_order_of_their_columns() {
        let read = Sums::read(|column| Ok::<_, ()>(i64::try_from(column).unwrap())).unwrap();
        assert_eq!((read.total_syncs, read.failed_syncs), (0, 1));
        let names: Vec<_> = read.named().collect();
        for (position, (name, value)) in names.iter().enumerate() {
            assert_eq!(
                (*name, *value),
                (Sums::COLUMNS[position], i64::try_from(position).unwrap())
            );
        }
        assert!(Sums::names().starts_with("total_syncs, failed_syncs, "));
        assert!(Sums::add_to("stored").starts_with("total_syncs = stored.total_syncs + excluded"));
    }
}
