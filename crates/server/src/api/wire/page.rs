//! The pagination object of every list. Older names that clients know stand beside it. The lists fill it in.

use serde::Serialize;
use utoipa::ToSchema;

use crate::store::Count;

/// The page size when the client does not choose one.
pub(crate) const DEFAULT_LIMIT: u32 = 50;

/// The position of a page in its list.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Pagination {
    /// The most items on the page; null without a limit.
    #[schema(example = 50)]
    pub(crate) limit: Option<u32>,
    /// The number of skipped items.
    #[schema(example = 0)]
    pub(crate) offset: u64,
    /// The number of items on all pages.
    #[schema(example = 5000)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) total: Option<u64>,
    /// Present instead of `total` when there are too many items to count: the number of items is at least this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) total_is_at_least: Option<u64>,
    /// The `cursor` of the next page; null on the last page. Absent if the list has no cursors.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub(crate) next_cursor: Option<Option<String>>,
}

impl Pagination {
    /// A page of a list without cursors.
    pub(crate) fn by_offset(limit: Option<u32>, offset: u64, total: Count) -> Self {
        let (total, total_is_at_least) = match total {
            Count::Exactly(total) => (Some(total), None),
            Count::AtLeast(total) => (None, Some(total)),
        };
        Self { limit, offset, total, total_is_at_least, next_cursor: None }
    }

    /// The same page with a cursor.
    pub(crate) fn with_next(self, next_cursor: Option<String>) -> Self {
        Self { next_cursor: Some(next_cursor), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_counted_to_its_end_says_so() {
        let page = |counted| Pagination::by_offset(Some(5), 0, Count::up_to(10, counted));
        let totals = |page: Pagination| (page.total, page.total_is_at_least);
        assert_eq!(totals(page(0)), (Some(0), None));
        assert_eq!(totals(page(10)), (Some(10), None));
        assert_eq!(totals(page(11)), (None, Some(10)));
    }
}
