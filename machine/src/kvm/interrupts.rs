//! A machine's interrupts: wired lines, and the messages of its devices.
//!
//! KVM has one table of where interrupts lead. The first 24 are wired to the interrupt controllers,
//! as they are by default. Each vector of a device has one of the others to itself, which leads to
//! the message that the guest wrote; a vector that is masked is not connected to it, so that the
//! device's signals stay in its eventfd.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use assigned_pci::{MsiController, MsiMessage, MsiVector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::KvmError;
use super::vm::io_error;

/// How many pins the I/O APIC has, and each of the two older controllers.
const IO_APIC_PINS: u32 = 24;
const PIC_PINS: u32 = 8;
/// How many routes KVM's table has room for (`KVM_MAX_IRQ_ROUTES`).
const MOST_ROUTES: u32 = 4096;

/// The interrupts of one machine. Clones are handles on the same.
#[derive(Debug, Clone)]
pub struct Interrupts(Arc<Table>);

#[derive(Debug)]
struct Table {
    vm: Arc<VmFd>,
    /// By their numbers; no message for one that leads nowhere.
    vectors: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

/// A wired interrupt that the machine's own devices raise.
pub struct InterruptLine {
    event: EventFd,
}

impl Interrupts {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self(Arc::new(Table {
            vm,
            vectors: Mutex::default(),
        }))
    }

    /// The line of a wired interrupt, edge-triggered.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn line(&self, gsi: u32) -> Result<InterruptLine, KvmError> {
        let doing = "connecting an interrupt line";
        let event = new_event().map_err(|source| KvmError { doing, source })?;
        self.0
            .vm
            .register_irqfd(&event, gsi)
            .map_err(|error| KvmError::new(doing, error))?;
        Ok(InterruptLine { event })
    }
}

impl MsiController for Interrupts {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let event = new_event()?;
        let number = self.0.take_number()?;
        Ok(Box::new(Vector {
            table: self.0.clone(),
            number,
            event,
            connected: false,
        }))
    }
}

impl Table {
    fn vectors(&self) -> MutexGuard<'_, BTreeMap<u32, Option<MsiMessage>>> {
        // Each change is one of a single entry.
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lowest number that no vector has.
    fn take_number(&self) -> io::Result<u32> {
        let mut vectors = self.vectors();
        // The wired ones that lead to two controllers have two routes.
        let last = MOST_ROUTES - IO_APIC_PINS;
        let number = (IO_APIC_PINS..last).find(|number| !vectors.contains_key(number));
        let number = number.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        vectors.insert(number, None);
        Ok(number)
    }

    /// Has a vector lead to `message`, or nowhere.
    fn lead(&self, number: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut vectors = self.vectors();
        let before = vectors.insert(number, message).flatten();
        let messages = vectors.iter();
        let messages = messages.filter_map(|(number, message)| Some((*number, (*message)?)));
        let entries: Vec<_> = wired().chain(messages.map(by_message)).collect();
        let set = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))
            .and_then(|routing| self.vm.set_gsi_routing(&routing).map_err(io_error));
        if set.is_err() {
            vectors.insert(number, before);
        }
        set
    }
}

/// One vector of a device.
struct Vector {
    table: Arc<Table>,
    number: u32,
    event: EventFd,
    /// Whether signals are delivered.
    connected: bool,
}

impl MsiVector for Vector {
    fn eventfd(&self) -> BorrowedFd<'_> {
        borrowed(&self.event)
    }

    fn route(&mut self, message: MsiMessage) -> io::Result<()> {
        self.table.lead(self.number, Some(message))?;
        if !self.connected {
            // KVM looks whether a signal is waiting, and delivers it.
            let connected = self.table.vm.register_irqfd(&self.event, self.number);
            connected.map_err(io_error)?;
            self.connected = true;
        }
        Ok(())
    }

    fn mask(&mut self) -> io::Result<()> {
        if self.connected {
            let apart = self.table.vm.unregister_irqfd(&self.event, self.number);
            apart.map_err(io_error)?;
            self.connected = false;
        }
        Ok(())
    }

    fn is_pending(&self) -> bool {
        let mut file = [PollFd::from_borrowed_fd(self.eventfd(), PollFlags::IN)];
        let at_once = Timespec::default();
        matches!(poll(&mut file, Some(&at_once)), Ok(1))
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // What KVM does not take apart goes with the machine. A number is only used again if it
        // leads nowhere.
        if self.mask().is_ok() && self.table.lead(self.number, None).is_ok() {
            self.table.vectors().remove(&self.number);
        }
    }
}

impl fmt::Debug for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vector")
            .field("number", &self.number)
            .field("connected", &self.connected)
            .finish_non_exhaustive()
    }
}

/// The routes of the wired interrupts: to the I/O APIC's pin of the same number, the first sixteen
/// to one of the older controllers as well.
fn wired() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let older = [
        (KVM_IRQCHIP_PIC_MASTER, 0),
        (KVM_IRQCHIP_PIC_SLAVE, PIC_PINS),
    ];
    let older = older.into_iter().flat_map(|(chip, first)| {
        (0..PIC_PINS).map(move |pin| (first.saturating_add(pin), chip, pin))
    });
    let io_apic = (0..IO_APIC_PINS).map(|pin| (pin, KVM_IRQCHIP_IOAPIC, pin));
    older
        .chain(io_apic)
        .map(|(gsi, irqchip, pin)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip, pin },
            },
            ..Default::default()
        })
}

fn by_message((gsi, message): (u32, MsiMessage)) -> kvm_irq_routing_entry {
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: u32::from_le_bytes([a, b, c, d]),
                address_hi: u32::from_le_bytes([e, f, g, h]),
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

impl InterruptLine {
    /// Raises it.
    ///
    /// # Errors
    /// Where the counter is full, which means that it is raised anyway.
    pub fn raise(&self) -> io::Result<()> {
        self.event.write(1)
    }
}

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.raise()
    }
}

impl fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptLine").finish_non_exhaustive()
    }
}

#[expect(
    unsafe_code,
    reason = "the crate's EventFd does not lend its file descriptor"
)]
fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the file descriptor is the event's own, which is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn new_event() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}
