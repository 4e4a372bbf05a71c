//! Networks that can be cut: namespaces on a separate bridge, and ports that drop all packets.
//!
//! **Invariants**
//! - Every resource made here is removed when its owner is dropped. Root is required; a test without
//!   it fails and prints the reason.
//! - Two networks never have the same addresses, whichever processes made them, and whatever a
//!   process that was killed has left behind.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

fn run(program: &str, args: &[&str]) -> Result<()> {
    output(program, args).map(drop)
}

/// Runs a program to its end; returns its output.
fn output(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {} failed: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns a number that no other network of this process has.
fn number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Returns whether networks can be made and cut on this machine; prints the reason when not.
pub fn available() -> bool {
    let probe = format!("vasto-probe-{}-{}", std::process::id(), number());
    let made = run("ip", &["netns", "add", &probe]).and_then(|()| {
        let cut = run("ip", &["netns", "exec", &probe, "iptables", "-A", "INPUT", "-j", "DROP"]);
        run("ip", &["netns", "del", &probe])?;
        cut
    });
    if let Err(error) = &made {
        println!("this test cuts networks, which is not possible here: {error:#}");
    }
    made.is_ok()
}

/// Subnets that networks choose from.
const SUBNETS: u32 = 250;

/// A subnet that no other network has, until this is dropped.
#[derive(Debug)]
struct Subnet {
    number: u32,
    /// Locked; the lock ends with the process.
    _claim: File,
}

impl Subnet {
    /// Claims the first free one behind a number.
    fn claim(from: u32) -> Result<Self> {
        let present = output("ip", &["-o", "-4", "addr", "show"])?;
        for number in (0..SUBNETS).map(|more| (from % SUBNETS + more) % SUBNETS + 1) {
            let path = std::env::temp_dir().join(format!("vasto-subnet-{number}.lock"));
            let claim = File::create(&path).with_context(|| format!("{}", path.display()))?;
            // What a killed process left behind has its address without a lock.
            let is_free = claim.try_lock().is_ok()
                && !present.contains(&format!(" {}/", address(number, None)));
            if is_free {
                return Ok(Self { number, _claim: claim });
            }
        }
        anyhow::bail!(
            "all subnets 10.77.x.0/24 are in use: `ip link` shows bridges vb* of tests that were killed"
        )
    }
}

/// Returns the address of a host of a subnet, or of the caller.
fn address(subnet: u32, host: Option<usize>) -> String {
    format!("10.77.{subnet}.{}", host.map_or(1, |host| host + 10))
}

/// Hosts on a separate network; the caller is on it too, with the first address.
#[derive(Debug)]
pub struct Network {
    bridge: String,
    subnet: Subnet,
    hosts: usize,
}

impl Network {
    /// Creates a network with this many hosts besides the caller.
    ///
    /// # Errors
    /// When the network cannot be made.
    pub fn new(hosts: usize) -> Result<Self> {
        let (id, number) = (std::process::id(), number());
        // The kernel takes 15 characters for the name of a link, which is the longest name made of
        // this.
        let bridge = format!("vb{}n{}", id % 1_000_000, number % 1_000);
        let network = Self { bridge, subnet: Subnet::claim(id.wrapping_add(7 * number))?, hosts };
        run("ip", &["link", "add", &network.bridge, "type", "bridge"])?;
        run(
            "ip",
            &["addr", "add", &format!("{}/24", network.address(None)), "dev", &network.bridge],
        )?;
        run("ip", &["link", "set", &network.bridge, "up"])?;
        for host in 0..hosts {
            let (namespace, outside, inside) =
                (network.namespace(host), network.link(host), "eth0");
            run("ip", &["netns", "add", &namespace])?;
            run(
                "ip",
                &[
                    "link", "add", &outside, "type", "veth", "peer", "name", inside, "netns",
                    &namespace,
                ],
            )?;
            run("ip", &["link", "set", &outside, "master", &network.bridge])?;
            run("ip", &["link", "set", &outside, "up"])?;
            let address = format!("{}/24", network.address(Some(host)));
            network.inside(host, &["ip", "addr", "add", &address, "dev", inside])?;
            network.inside(host, &["ip", "link", "set", inside, "up"])?;
            network.inside(host, &["ip", "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    /// Returns the number of hosts besides the caller.
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// Returns the namespace of a host, for `ip netns exec`.
    pub fn namespace(&self, host: usize) -> String {
        format!("{}h{host}", self.bridge)
    }

    fn link(&self, host: usize) -> String {
        format!("{}e{host}", self.bridge)
    }

    /// Returns the address of a host, or of the caller.
    pub fn address(&self, host: Option<usize>) -> String {
        address(self.subnet.number, host)
    }

    fn inside(&self, host: usize, command: &[&str]) -> Result<()> {
        let namespace = self.namespace(host);
        let mut args = vec!["netns", "exec", &namespace];
        args.extend(command);
        run("ip", &args)
    }

    /// Cuts a host off from all others; packets are dropped without an error.
    ///
    /// # Errors
    /// When the rules cannot be set.
    pub fn cut(&self, host: usize) -> Result<()> {
        for (chain, direction) in [("INPUT", "-i"), ("OUTPUT", "-o")] {
            self.inside(host, &["iptables", "-A", chain, direction, "eth0", "-j", "DROP"])?;
        }
        Ok(())
    }

    /// Cuts two hosts off from each other; all others reach both.
    ///
    /// # Errors
    /// When the rules cannot be set.
    pub fn cut_between(&self, one: usize, other: usize) -> Result<()> {
        for (host, peer) in [(one, other), (other, one)] {
            self.inside(
                host,
                &["iptables", "-A", "INPUT", "-s", &self.address(Some(peer)), "-j", "DROP"],
            )?;
        }
        Ok(())
    }

    /// Returns the number of packets that the cuts of a host have dropped so far.
    ///
    /// # Errors
    /// When the rules cannot be listed.
    pub fn dropped(&self, host: usize) -> Result<u64> {
        let namespace = self.namespace(host);
        let list = ["netns", "exec", &namespace, "iptables", "-L", "-n", "-v", "-x"];
        Ok(output("ip", &list)?.lines().filter_map(dropped_by).sum())
    }

    /// Ends all cuts of a host.
    ///
    /// # Errors
    /// When the rules cannot be removed.
    pub fn heal(&self, host: usize) -> Result<()> {
        self.inside(host, &["iptables", "-F"])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = run("ip", &["netns", "del", &self.namespace(host)]);
            let _ = run("ip", &["link", "del", &self.link(host)]);
        }
        let _ = run("ip", &["link", "del", &self.bridge]);
    }
}

/// Returns the packets that a rule has dropped, from its line in the list of rules.
fn dropped_by(line: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    let packets = words.next()?.parse().ok()?;
    (words.nth(1)? == "DROP").then_some(packets)
}

/// A port of this machine that drops all packets, until it is dropped.
#[derive(Debug)]
pub struct SilentPort(String);

impl SilentPort {
    /// Silences a TCP port on all addresses, in both directions.
    ///
    /// # Errors
    /// When the rules cannot be set.
    pub fn new(port: u16) -> Result<Self> {
        let silent = Self(port.to_string());
        for direction in ["--dport", "--sport"] {
            run("iptables", &["-A", "INPUT", "-p", "tcp", direction, &silent.0, "-j", "DROP"])?;
        }
        Ok(silent)
    }
}

impl Drop for SilentPort {
    fn drop(&mut self) {
        for direction in ["--dport", "--sport"] {
            let _ =
                run("iptables", &["-D", "INPUT", "-p", "tcp", direction, &self.0, "-j", "DROP"]);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_subnet_is_claimed_once_until_its_network_is_gone() {
        let first = Subnet::claim(u32::MAX).unwrap();
        let second = Subnet::claim(u32::MAX).unwrap();
        assert_ne!(first.number, second.number);
        let number = first.number;
        drop(first);
        assert_eq!(Subnet::claim(u32::MAX).unwrap().number, number);
    }

    #[test]
    fn the_packets_of_rules_that_drop_are_counted_and_no_others() {
        const LIST: &str = "\
Chain INPUT (policy ACCEPT 812 packets, 90123 bytes)
    pkts      bytes target     prot opt in     out     source               destination
      17     1020 DROP       all  --  eth0   *       0.0.0.0/0            0.0.0.0/0
       9      540 ACCEPT     all  --  lo     *       0.0.0.0/0            0.0.0.0/0

Chain OUTPUT (policy ACCEPT 5 packets, 300 bytes)
    pkts      bytes target     prot opt in     out     source               destination
       4      240 DROP       0    --  *      eth0    0.0.0.0/0            0.0.0.0/0
";
        assert_eq!(LIST.lines().filter_map(dropped_by).sum::<u64>(), 21);
    }
}
