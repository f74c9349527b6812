//! What can go wrong in a store, by what the caller can do about it. Both stores make these errors; callers retry, wait
//! or answer by their kind and never look into their texts.

/// What can go wrong in a store, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is away, busy or full, or cannot be used as it is. Nothing was changed, and trying again later may
    /// work. The text says which: a database that answers is not called unavailable.
    #[error("{0}")]
    Unavailable(String),
    /// The database works, but rolled this transaction back for a passing reason. Examples are a deadlock, a cancelled
    /// statement, and a lock that others hold. Nothing was changed, and trying again may work at once.
    #[error("the database gave the transaction up: {0}")]
    Transient(String),
    /// The connection died during a commit, so the outcome of the transaction is unknown. Writing the same batch again
    /// finds out first.
    #[error("the connection was lost during a commit: {0}")]
    OutcomeUnknown(String),
    /// PostgreSQL has carried the change out, but warns that the synchronous standby may lack it. Somebody, or a
    /// time-out, has ended the commit's wait. The change may be lost if the standby takes over.
    #[error(
        "the change was made on this database server, but may not be replicated: the wait of its commit for the \
         synchronous standby was ended; see to the standby, and look whether the change is there before you repeat it"
    )]
    Unreplicated,
    /// The database refused the data itself; nothing was changed, and trying again won't help.
    #[error("the database refused the data: {0}")]
    Rejected(String),
    /// Devices are not in the groups that they must be in; nothing was changed.
    #[error(transparent)]
    OtherGroup(#[from] OtherGroup),
    /// Too many reads were in progress, so this one got no turn. Nothing is wrong with the database.
    #[error("{0}")]
    Busy(String),
    /// A read took too long and was given up, so that others get their turn.
    #[error("{0}")]
    TooSlow(String),
    /// The thread or task that writes has ended. Only a restart of the process helps.
    #[error("the writer has stopped")]
    Stopped,
    /// Anything else: a bug, a foreign schema, a damaged file.
    #[error("{0}")]
    Failed(String),
}

/// Why nothing of a batch was stored: devices are not in the groups that they must be in.
#[derive(Debug, thiserror::Error)]
#[error("devices are not in the group that they must be in")]
pub struct OtherGroup {
    /// Where the events of the refused claims begin.
    pub refused: Vec<usize>,
}
