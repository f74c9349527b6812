//! The hosts of a database, and which of them is asked first. `connect` calls this. It opens no connection itself.
//!
//! The host that answered last is remembered for the entire process. A server connects to migrate, then to serve, and a
//! command may connect several times. A silent host should cost its time-out only once.

use std::{
    fmt,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio_postgres::config::{Config, Host};

use super::no_session::NoSession;

/// Each list of hosts that this process has connected to. A process has one or two.
static KNOWN: Mutex<Vec<Arc<Hosts>>> = Mutex::new(Vec::new());

/// The hosts of a configuration, in its order.
pub(super) struct Hosts {
    places: Vec<Place>,
    /// Position of the host to ask first. It is the host that gave the last session, or the one behind a host that gave
    /// none. A caller that gives up waiting for a silent host therefore begins with another one the next time.
    first: AtomicUsize,
}

/// Where a server listens.
pub(super) struct Place {
    host: Option<Host>,
    /// The host's address, if it need not be looked up.
    address: Option<IpAddr>,
    port: u16,
    /// The address that gave the last session, if the name has several.
    answered: Mutex<Option<IpAddr>>,
}

impl Hosts {
    /// The hosts of `given`. Configurations that name the same hosts in the same order get the same value.
    pub(super) fn of(given: &Config) -> Arc<Self> {
        let places = places(given);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |hosts: &&Arc<Self>| {
            hosts.places.len() == places.len()
                && hosts.places.iter().zip(&places).all(|(one, other)| one.is_at(other))
        };
        if let Some(hosts) = known.iter().find(is_same) {
            return Arc::clone(hosts);
        }
        let hosts = Arc::new(Self { places, first: AtomicUsize::new(0) });
        known.push(Arc::clone(&hosts));
        hosts
    }

    pub(super) fn places(&self) -> &[Place] {
        &self.places
    }

    /// Positions of all hosts: from the one to ask first to the end, then from the beginning.
    pub(super) fn in_order(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, count) = (self.first.load(Ordering::Relaxed), self.places.len());
        (first..first + count).map(move |position| position % count)
    }

    /// Begins to ask the host at `position`.
    pub(super) fn ask(&self, position: usize) -> Asking<'_> {
        Asking { hosts: self, position, has_answered: false }
    }
}

/// A host that is being asked. If it is dropped without an answer, the next host is asked first from then on. That
/// includes a caller that gave up waiting. Until the outcome is known, others ask the same host, because it may be the
/// one that works.
pub(super) struct Asking<'a> {
    hosts: &'a Hosts,
    position: usize,
    has_answered: bool,
}

impl Asking<'_> {
    /// The host has given a session. It is asked first from now on.
    pub(super) fn answered(mut self) {
        self.has_answered = true;
        self.hosts.first.store(self.position, Ordering::Relaxed);
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if self.has_answered {
            return;
        }
        let (first, next) = (&self.hosts.first, (self.position + 1) % self.hosts.places.len());
        // A caller that has learnt more meanwhile has already changed the position.
        let _ = first.compare_exchange(self.position, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Reads the hosts of a configuration. One port may apply to all of them.
fn places(given: &Config) -> Vec<Place> {
    let (hosts, addresses, ports) = (given.get_hosts(), given.get_hostaddrs(), given.get_ports());
    let place = |position: usize| Place {
        host: hosts.get(position).cloned(),
        address: addresses.get(position).copied(),
        port: ports.get(position).or(ports.first()).copied().unwrap_or(5432),
        answered: Mutex::default(),
    };
    (0..hosts.len().max(addresses.len())).map(place).collect()
}

impl Place {
    /// Whether both name the same host and port.
    fn is_at(&self, other: &Self) -> bool {
        (&self.host, self.address, self.port) == (&other.host, other.address, other.port)
    }

    /// The name and port to look up; `None` for a socket in the file system.
    pub(super) async fn addresses(
        &self,
        timeout: Duration,
    ) -> Result<Vec<Option<IpAddr>>, NoSession> {
        let name = match (&self.host, self.address) {
            (_, Some(address)) => return Ok(vec![Some(address)]),
            (Some(Host::Tcp(name)), None) => name,
            (_, None) => return Ok(vec![None]),
        };
        let found = tokio::net::lookup_host((name.as_str(), self.port));
        match tokio::time::timeout(timeout, found).await {
            Ok(Ok(found)) => Ok(self.answered_first(found.map(|address| address.ip()))),
            Ok(Err(error)) => Err(NoSession::Unfit(format!(
                "the name cannot be looked up: {error}; set DB_HOST or DATABASE_URL to a host that is there"
            ))),
            Err(_) => Err(NoSession::Unfit(
                "the name cannot be looked up in time; check this machine's name servers".into(),
            )),
        }
    }

    /// The addresses in their order, except that the one that answered last comes first.
    fn answered_first(&self, found: impl Iterator<Item = IpAddr>) -> Vec<Option<IpAddr>> {
        let mut addresses: Vec<_> = found.map(Some).collect();
        let answered = *self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        // A stable sort keeps the order of the others.
        addresses.sort_by_key(|address| answered.is_none() || *address != answered);
        addresses
    }

    /// Notes that `address` has given a session.
    pub(super) fn note_answered(&self, address: Option<IpAddr>) {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// Makes `config` lead to this host alone.
    pub(super) fn put_into(&self, config: &mut Config, address: Option<IpAddr>) {
        match &self.host {
            Some(Host::Tcp(name)) => config.host(name),
            Some(Host::Unix(path)) => config.host_path(path),
            None => config,
        };
        if let Some(address) = address {
            config.hostaddr(address);
        }
        config.port(self.port);
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.address) {
            (Some(Host::Tcp(name)), _) if name.contains(':') => {
                write!(formatter, "[{name}]:{}", self.port)
            }
            (Some(Host::Tcp(name)), _) => write!(formatter, "{name}:{}", self.port),
            (Some(Host::Unix(path)), _) => write!(formatter, "{}:{}", path.display(), self.port),
            (None, Some(address)) => write!(formatter, "{address}:{}", self.port),
            (None, None) => formatter.write_str("no host"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(names: &[&str]) -> Arc<Hosts> {
        let mut config = Config::new();
        for name in names {
            config.host(*name).port(1);
        }
        Hosts::of(&config)
    }

    fn order(hosts: &Hosts) -> Vec<usize> {
        hosts.in_order().collect()
    }

    #[test]
    fn the_host_that_answered_is_remembered_for_its_own_list_alone() {
        let (first, same) =
            (hosts(&["a.test", "b.test", "c.test"]), hosts(&["a.test", "b.test", "c.test"]));
        let others = [
            hosts(&["b.test", "a.test", "c.test"]),
            hosts(&["a.test", "b.test"]),
            hosts(&["a.test", "b.test", "d.test"]),
        ];
        drop(first.ask(0));
        assert_eq!(order(&same), [1, 2, 0]);
        first.ask(1).answered();
        assert_eq!(order(&same), [1, 2, 0]);
        for other in others {
            assert_eq!(order(&other)[0], 0);
        }
        drop(same.ask(1));
        drop(same.ask(2));
        assert_eq!(order(&first), [0, 1, 2]);
    }

    /// Several connections are made at once, but not all of them at the silent host.
    #[test]
    fn a_host_that_is_being_asked_stays_the_first() {
        let hosts = hosts(&["silent.test", "good.test"]);
        let patient = hosts.ask(0);
        let hasty = hosts.ask(0);
        assert_eq!(order(&hosts), [0, 1]);
        drop(hasty);
        hosts.ask(1).answered();
        let next = hosts.ask(1);
        assert_eq!(order(&hosts), [1, 0]);
        drop(patient);
        assert_eq!(order(&hosts), [1, 0]);
        next.answered();
        assert_eq!(order(&hosts), [1, 0]);
    }

    #[test]
    fn of_a_names_addresses_the_one_that_answered_is_first() {
        let hosts = hosts(&["several.test"]);
        let place = &hosts.places()[0];
        let found: Vec<IpAddr> =
            ["::1", "127.0.0.1", "127.0.0.2"].map(|at| at.parse().unwrap()).into();
        let order = |positions: [usize; 3]| positions.map(|at| Some(found[at])).to_vec();
        let now = || place.answered_first(found.iter().copied());
        assert_eq!(now(), order([0, 1, 2]));
        place.note_answered(Some(found[1]));
        assert_eq!(now(), order([1, 0, 2]));
        // The client may have gone.
        place.note_answered(Some("192.0.2.1".parse().unwrap()));
        assert_eq!(now(), order([0, 1, 2]));
    }
}
