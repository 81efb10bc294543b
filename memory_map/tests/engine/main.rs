//! The engine as a whole: against a page-by-page model, and promise by promise.

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod lifetimes;
#[cfg(test)]
mod missing;
#[cfg(test)]
mod model;
#[cfg(test)]
mod page_table;
#[cfg(test)]
mod races;
#[cfg(test)]
mod regressions;
#[cfg(test)]
mod room;
#[cfg(test)]
mod threads;
