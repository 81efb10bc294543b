//! A machine's interrupts: wired lines, and the messages of its devices.
//!
//! KVM has one table of where interrupts lead. The first 24 are wired to the interrupt controllers,
//! as they are by default. Each vector of a device has one of the others to itself, which leads to
//! the message that the guest wrote; a vector that is masked is not connected to it, so that the
//! device's signals stay in its eventfd.
//!
//! A message is a write to an address, and only those of the local APICs are interrupts (Intel's
//! manual, volume 3, 11.11.1). KVM does not look: it takes any address apart as if it were one of
//! these. So a vector whose message goes elsewhere is not connected either, and what its device
//! signals is lost; on a PC, RAM or a peer's BAR would have the four bytes. A signal that was lost is
//! said, as soon as the vector is masked or led elsewhere, because no driver means that; the message
//! alone is not, because Linux leaves one of zeros when it has done with a vector.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

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
use crate::Notices;
use crate::platform::LOCAL_APIC;

/// How many pins the I/O APIC has, and each of the two older controllers.
const IO_APIC_PINS: u32 = 24;
const PIC_PINS: u32 = 8;
/// How many routes KVM's table has room for (`KVM_MAX_IRQ_ROUTES`).
const MOST_ROUTES: u32 = 4096;
/// Messages to these addresses are interrupts.
const MESSAGES: Range<u64> = LOCAL_APIC.raw()..LOCAL_APIC.raw() + 0x10_0000;

/// The interrupts of one machine. Clones are handles on the same.
#[derive(Debug, Clone)]
pub struct Interrupts(Arc<Table>);

/// The interrupts of one function: where its vectors come from.
#[derive(Debug)]
pub struct FunctionInterrupts {
    table: Arc<Table>,
    function: Arc<str>,
}

#[derive(Debug)]
struct Table {
    kernel: Arc<dyn Kernel>,
    /// By their numbers; no message for one that leads nowhere.
    vectors: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
    notices: OnceLock<Arc<Notices>>,
}

/// What of KVM is needed here. Tests stand in for it.
trait Kernel: Send + Sync + fmt::Debug {
    fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> io::Result<()>;

    /// From now on what is signalled is delivered, and what has been.
    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()>;

    fn disconnect(&self, event: &EventFd, number: u32) -> io::Result<()>;
}

impl Kernel for VmFd {
    fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let routes = KvmIrqRouting::from_entries(routes);
        let routes = routes.map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))?;
        self.set_gsi_routing(&routes).map_err(io_error)
    }

    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        self.register_irqfd(event, number).map_err(io_error)
    }

    fn disconnect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        self.unregister_irqfd(event, number).map_err(io_error)
    }
}

/// A wired interrupt that the machine's own devices raise.
pub struct InterruptLine {
    event: EventFd,
}

impl Interrupts {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self::of_kernel(vm)
    }

    fn of_kernel(kernel: Arc<dyn Kernel>) -> Self {
        Self(Arc::new(Table {
            kernel,
            vectors: Mutex::default(),
            notices: OnceLock::new(),
        }))
    }

    /// The interrupts of the function that is called this.
    #[must_use]
    pub fn of(&self, function: &str) -> FunctionInterrupts {
        FunctionInterrupts {
            table: self.0.clone(),
            function: function.into(),
        }
    }

    /// Who is told of messages that are none. The first one stays it.
    pub(crate) fn tell(&self, notices: Arc<Notices>) {
        self.0.notices.get_or_init(|| notices);
    }

    /// The line of a wired interrupt, edge-triggered.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn line(&self, gsi: u32) -> Result<InterruptLine, KvmError> {
        let doing = "connecting an interrupt line";
        let failed = |source| KvmError { doing, source };
        let event = new_event().map_err(failed)?;
        self.0.kernel.connect(&event, gsi).map_err(failed)?;
        Ok(InterruptLine { event })
    }
}

impl MsiController for FunctionInterrupts {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let event = new_event()?;
        let number = self.table.take_number()?;
        Ok(Box::new(Vector {
            table: self.table.clone(),
            function: self.function.clone(),
            number,
            event,
            connected: false,
            loses: None,
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
        let set = self.kernel.set_routes(&entries);
        if set.is_err() {
            vectors.insert(number, before);
        }
        set
    }
}

/// One vector of a device.
struct Vector {
    table: Arc<Table>,
    /// Whose.
    function: Arc<str>,
    number: u32,
    event: EventFd,
    /// Whether signals are delivered.
    connected: bool,
    /// Where they are lost to: a message that goes to no interrupt controller.
    loses: Option<MsiMessage>,
}

impl Vector {
    fn connect(&mut self) -> io::Result<()> {
        if !self.connected {
            // KVM looks whether a signal is waiting, and delivers it.
            self.table.kernel.connect(&self.event, self.number)?;
            self.connected = true;
        }
        Ok(())
    }

    fn disconnect(&mut self) -> io::Result<()> {
        if self.connected {
            self.table.kernel.disconnect(&self.event, self.number)?;
            self.connected = false;
        }
        Ok(())
    }

    /// Forgets what was signalled while that was to be lost, and says so.
    fn lose(&mut self) {
        let Some(MsiMessage { address, data }) = self.loses.take() else {
            return;
        };
        // It fails where nothing was.
        if self.event.read().is_ok()
            && let Some(notices) = self.table.notices.get()
        {
            let what = "an interrupt was sent where no interrupt controller is, and is lost";
            let detail = format_args!("{data:#x} to {address:#x}");
            notices.note(&self.function, what, &detail);
        }
    }
}

impl MsiVector for Vector {
    fn eventfd(&self) -> BorrowedFd<'_> {
        borrowed(&self.event)
    }

    fn route(&mut self, message: MsiMessage) -> io::Result<()> {
        if !MESSAGES.contains(&message.address) {
            self.disconnect()?;
            self.lose();
            self.loses = Some(message);
            return Ok(());
        }
        self.table.lead(self.number, Some(message))?;
        self.lose();
        self.connect()
    }

    fn mask(&mut self) -> io::Result<()> {
        self.disconnect()?;
        self.lose();
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What KVM was told last.
    #[derive(Debug, Default)]
    struct FakeKernel(Mutex<State>);

    #[derive(Debug, Default)]
    struct State {
        routes: BTreeMap<u32, (u64, u32)>,
        connected: BTreeSet<u32>,
    }

    impl Kernel for FakeKernel {
        #[expect(
            unsafe_code,
            reason = "a route's kind says which part of the union it is"
        )]
        fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> io::Result<()> {
            let messages = routes.iter().filter(|it| it.type_ == KVM_IRQ_ROUTING_MSI);
            let routes = messages.map(|route| {
                // SAFETY: it is a message's.
                let msi = unsafe { route.u.msi };
                let address = u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo);
                (route.gsi, (address, msi.data))
            });
            self.0.lock().unwrap().routes = routes.collect();
            Ok(())
        }

        fn connect(&self, _: &EventFd, number: u32) -> io::Result<()> {
            assert!(self.0.lock().unwrap().connected.insert(number));
            Ok(())
        }

        fn disconnect(&self, _: &EventFd, number: u32) -> io::Result<()> {
            assert!(self.0.lock().unwrap().connected.remove(&number));
            Ok(())
        }
    }

    impl FakeKernel {
        fn delivers(&self) -> Vec<(u64, u32)> {
            let state = self.0.lock().unwrap();
            let connected = state.connected.iter();
            connected.map(|number| state.routes[number]).collect()
        }
    }

    fn to(address: u64) -> MsiMessage {
        MsiMessage {
            address,
            data: 0x41,
        }
    }

    fn raise(vector: &dyn MsiVector) {
        let event = vector.eventfd();
        rustix::io::write(event, &1_u64.to_ne_bytes()).unwrap();
    }

    #[test]
    fn a_message_to_no_interrupt_controller_is_lost_and_said() {
        let kernel = Arc::new(FakeKernel::default());
        let interrupts = Interrupts::of_kernel(kernel.clone());
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        interrupts.tell(Arc::new(Notices::new(move |line| {
            heard.lock().unwrap().push(line.to_owned());
        })));
        let mut vector = interrupts.of("0000:01:00.0").vector().unwrap();
        // What nobody signals is no loss.
        vector.route(to(8)).unwrap();
        let nobodies = [0, 0x1000, 0xfedf_fffc, 0xfef0_0000, 0x1_fee0_0000, !3];
        for address in nobodies {
            vector.route(to(0xfee0_1000)).unwrap();
            assert_eq!(kernel.delivers(), [(0xfee0_1000, 0x41)]);
            vector.route(to(address)).unwrap();
            assert_eq!(kernel.delivers(), [], "{address:#x}");
            raise(&*vector);
            vector.route(to(0xfeef_fffc)).unwrap();
            assert!(!vector.is_pending(), "it comes late, and elsewhere");
            assert_eq!(kernel.delivers(), [(0xfeef_fffc, 0x41)]);
        }
        let said = said.lock().unwrap();
        assert_eq!(
            *said,
            [
                "0000:01:00.0: an interrupt was sent where no interrupt controller is, and is lost: \
              0x41 to 0x0"
            ]
        );
    }

    #[test]
    fn a_vector_that_loses_its_signals_keeps_them_once_it_is_masked() {
        let kernel = Arc::new(FakeKernel::default());
        let interrupts = Interrupts::of_kernel(kernel.clone());
        let mut vector = interrupts.of("0000:01:00.0").vector().unwrap();
        raise(&*vector);
        assert!(vector.is_pending());
        // What was kept goes with the message, nowhere.
        vector.route(to(0)).unwrap();
        raise(&*vector);
        vector.mask().unwrap();
        assert!(!vector.is_pending());
        raise(&*vector);
        assert!(vector.is_pending());
        vector.route(to(0xfee0_0000)).unwrap();
        assert!(vector.is_pending(), "for KVM to take");
        assert_eq!(kernel.delivers(), [(0xfee0_0000, 0x41)]);
        drop(vector);
        assert_eq!(kernel.delivers(), []);
    }
}
