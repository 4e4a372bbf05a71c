//! A gate that lets few threads through at a time; for work that blocks.

use parking_lot::{Condvar, Mutex};

#[derive(Debug)]
struct State {
    free: usize,
    waiting: usize,
}

/// See the top of this file.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    freed: Condvar,
}

/// A place inside, given back when it is dropped.
pub struct Entered<'a>(&'a Gate);

impl Gate {
    /// A gate with so many places behind it, at least one.
    pub fn new(places: usize) -> Self {
        Self { state: Mutex::new(State { free: places.max(1), waiting: 0 }), freed: Condvar::new() }
    }

    /// Waits for a place.
    pub fn enter(&self) -> Entered<'_> {
        let mut state = self.state.lock();
        state.waiting += 1;
        self.freed.wait_while(&mut state, |state| state.free == 0);
        state.waiting -= 1;
        state.free -= 1;
        Entered(self)
    }

    /// Threads that wait for a place.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.state.lock().waiting
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.state.lock().free += 1;
        self.0.freed.notify_one();
    }
}
