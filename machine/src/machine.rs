//! The machine: processors around their hardware, from power-on to its end.
//!
//! The embedder makes a [`Machine`] when the memory map, the IOMMUs and the functions are there,
//! and calls [`Machine::run`], which returns when the guest is off. Meanwhile other threads press
//! the power button, type, or end it through [`Controls`].
//!
//! ```text
//!   run()  --+-- load the kernel, set the registers
//!            |-- one thread for each processor --+
//!            |-- wait: Request, Controls, Stop   |  Board: ports, trapped memory
//!            |-- stop the threads <--------------+
//!            |-- functions quiet and reset
//!            +-- reset: once more   anything else: Ended
//! ```

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use assigned_pci::AssignedFunction;
use memory_map::{Backing, ChangeError, RegionManager, TargetHandle};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::chipset::{Chipset, Request};
use crate::guest_ram::{self, GuestRamError};
use crate::kvm::{KvmError, Processor, Stop, Vm};
use crate::layout::Layout;
use crate::pci::Place;
use crate::platform::{EVENT_GSI, RESET_CODE, RESET_VECTOR, SERIAL_GSI};
use crate::slots_lost::SlotsLost;
use crate::{Hardware, HardwareError, Notices, PulledOut, acpi, boot};

/// How often a processor is told to stop until it has.
const BETWEEN_SIGNALS: Duration = Duration::from_millis(1);

/// What a guest is started with. The files stay open, for a reset begins with them again.
#[derive(Debug)]
pub struct Images {
    /// A Linux kernel: a bzImage, or an ELF file with an entry for PVH.
    pub kernel: File,
    /// An initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub command_line: String,
}

/// What a machine is made from.
pub struct Parts {
    /// KVM's side of it, to which assigned devices' files have been announced.
    pub vm: Vm,
    /// The map that the IOMMUs follow.
    pub map: RegionManager,
    /// Where everything goes.
    pub layout: Layout,
    /// As much [`Ram`](host_memory::Ram) as the layout places.
    pub ram: Backing,
    /// The functions, in the order in which the guest finds them. Their regions are in the map.
    pub functions: Vec<Arc<AssignedFunction>>,
    /// How many processors: at least one.
    pub processors: u8,
    /// What is started.
    pub images: Images,
    /// Where the serial port's output goes.
    pub console: Box<dyn io::Write + Send>,
    /// Who is told what goes wrong by the guest's doing.
    pub notices: Arc<Notices>,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("vm", &self.vm)
            .field("layout", &self.layout)
            .field("functions", &self.functions)
            .field("processors", &self.processors)
            .field("images", &self.images)
            .finish_non_exhaustive()
    }
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// KVM refuses something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// RAM, platform or functions cannot be put together.
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    /// RAM does not go into the memory slots.
    #[error("giving the guest its RAM failed")]
    MemorySlots(#[source] ChangeError),
    /// RAM cannot be filled.
    #[error(transparent)]
    Ram(#[from] GuestRamError),
    /// The firmware's tables and code do not go into RAM.
    #[error("writing the firmware failed")]
    Write(#[source] GuestMemoryError),
    /// The firmware tables cannot be made.
    #[error(transparent)]
    Tables(#[from] acpi::TablesError),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A thread or its signal cannot be had.
    #[error("running a processor failed")]
    Thread(#[source] io::Error),
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// It turned itself off.
    PoweredOff,
    /// [`Controls::end`] was called.
    Told,
    /// Its kernel has panicked, and said so.
    Panicked,
    /// A processor cannot go on.
    Failed {
        /// Which, by number.
        processor: usize,
        /// Why, for people.
        why: String,
    },
    /// KVM has not taken a memory slot away: a processor might see a BAR where it no longer is.
    SlotsLost {
        /// Which, and what KVM said, for people.
        why: String,
    },
}

/// What others may do to a running machine. Clones are handles on the same.
#[derive(Debug, Clone)]
pub struct Controls {
    /// Not the functions with it: they end with the machine, whoever still has controls.
    chipset: Arc<Chipset>,
    hardware: Weak<Hardware>,
    told: Arc<AtomicBool>,
    events: Sender<Event>,
}

impl Controls {
    /// Presses the power button; what comes of it is up to the guest.
    pub fn press_power_button(&self) {
        self.chipset.press_power_button();
    }

    /// Ends the machine, as pulling the plug would.
    pub fn end(&self) {
        self.told.store(true, Ordering::Release);
        // Nobody listens if it has ended.
        let _unheard = self.events.send(Event::Told);
    }

    /// Pulls a function out, by its place among [`Parts::functions`]. To the guest it is as a device
    /// that was pulled out without a word: config space and BARs read all ones, writes do nothing, no
    /// interrupt comes; it stays away over a reset. When this returns it masters the bus no more, and
    /// its BARs are in no IOMMU and no memory slot, unless its outcome says otherwise. None if there is no such function, or not any more,
    /// or if the machine is gone.
    #[must_use = "the function is given back to the host when this is dropped"]
    pub fn pull_out(&self, function: usize) -> Option<PulledOut> {
        self.hardware.upgrade()?.pull_out(function)
    }

    /// Types on the serial console.
    pub fn type_in(&self, typed: &[u8]) {
        self.chipset.type_in(typed);
    }
}

/// What the machine waits for.
#[derive(Debug)]
pub(crate) enum Event {
    /// The guest asks for something.
    Asked(Request),
    /// A processor, by number, does not run on.
    Stopped(usize, Stop),
    /// The memory slots no longer follow the map, and why.
    SlotsLost(String),
    /// Somebody wants it to end.
    Told,
}

/// A virtual machine. See the [crate's documentation](crate) for what it keeps.
pub struct Machine {
    // Fields end in this order: nobody runs, then the memory slots go, then KVM's file.
    processors: Vec<Processor>,
    hardware: Arc<Hardware>,
    slots: TargetHandle,
    slots_lost: Arc<SlotsLost>,
    vm: Vm,
    layout: Layout,
    ram: Backing,
    images: Images,
    events: Receiver<Event>,
    controls: Controls,
    notices: Arc<Notices>,
}

impl Machine {
    /// Puts a machine together. Nothing runs yet.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn new(parts: Parts) -> Result<Self, MachineError> {
        let (sender, events) = mpsc::channel();
        parts.vm.interrupts().tell(parts.notices.clone());
        let chipset = Chipset::new(
            Box::new(parts.vm.interrupts().line(SERIAL_GSI)?),
            Box::new(parts.vm.interrupts().line(EVENT_GSI)?),
            parts.console,
        );
        let asked = sender.clone();
        let hardware = Arc::new(Hardware::new(
            parts.map.clone(),
            parts.ram.clone(),
            parts.layout.ram(),
            parts.functions,
            chipset,
            Box::new(move |request| {
                // Nobody listens when the machine ends already.
                let _unheard = asked.send(Event::Asked(request));
            }),
            parts.notices.clone(),
        )?);
        let slots_lost = SlotsLost::new(sender.clone());
        let slots = parts
            .map
            .register(Box::new(parts.vm.memory_slots()), slots_lost.options())
            .map_err(MachineError::MemorySlots)?;
        let mut processors = Vec::new();
        for number in 0..parts.processors {
            processors.push(parts.vm.processor(number, parts.processors)?);
        }
        let controls = Controls {
            chipset: hardware.chipset().clone(),
            hardware: Arc::downgrade(&hardware),
            told: Arc::default(),
            events: sender,
        };
        Ok(Self {
            processors,
            hardware,
            slots,
            slots_lost,
            vm: parts.vm,
            layout: parts.layout,
            ram: parts.ram,
            images: parts.images,
            events,
            controls,
            notices: parts.notices,
        })
    }

    /// A handle for others.
    #[must_use]
    pub fn controls(&self) -> Controls {
        self.controls.clone()
    }

    /// Where each function is for the guest, in the order in which they were given.
    #[must_use]
    pub fn places(&self) -> &[Place] {
        self.hardware.places()
    }

    /// Runs the guest until it ends. A reset is no end: it begins anew, with the same images. When
    /// this returns no processor runs, and the functions are quiet and reset.
    ///
    /// # Errors
    /// Where the kernel cannot be loaded, or KVM refuses a reset.
    pub fn run(&mut self) -> Result<Ended, MachineError> {
        loop {
            self.load()?;
            let ended = self.run_once();
            // Devices stop before anything else is touched.
            self.hardware.reset();
            let told = self.controls.told.load(Ordering::Acquire);
            if let Some(ended) = again(ended?, told, &self.slots_lost) {
                return Ok(ended);
            }
            self.vm.reset()?;
            for processor in &self.processors {
                processor.reset()?;
            }
        }
    }

    /// Fills RAM and sets the registers, as firmware would.
    fn load(&self) -> Result<(), MachineError> {
        let cpus = u32::try_from(self.processors.len()).unwrap_or(u32::MAX);
        let memory = guest_ram::open(&self.ram, self.layout.ram())?;
        let tables = acpi::tables(&acpi::Platform {
            cpus,
            layout: &self.layout,
        })?;
        memory
            .write_slice(&tables.bytes, GuestAddress(tables.address.raw()))
            .and_then(|()| memory.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR.raw())))
            .map_err(MachineError::Write)?;
        let images = boot::Images {
            kernel: &self.images.kernel,
            initrd: self.images.initrd.as_ref(),
            cmdline: &self.images.command_line,
        };
        let entry = boot::load(&memory, &self.layout, &images, tables.rsdp)?;
        if let Some(first) = self.processors.first() {
            first.enter_at(|general, special| entry.registers(general, special))?;
        }
        Ok(())
    }

    /// Runs all processors until something ends that; whether to begin again.
    fn run_once(&mut self) -> Result<ControlFlow<Ended>, MachineError> {
        // The handler has nothing to do but to be there.
        extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), wake)
            .map_err(|error| MachineError::Thread(error.into()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        let mut started = Ok(());
        for (number, processor) in self.processors.drain(..).enumerate() {
            let hardware = self.hardware.clone();
            let events = self.controls.events.clone();
            match start(number, processor, hardware, events, stop.clone()) {
                Ok(thread) => running.push(thread),
                Err(error) => {
                    started = Err(MachineError::Thread(error));
                    break;
                }
            }
        }
        let outcome = match started {
            Ok(()) => Ok(wait(&self.events, &self.notices)),
            Err(error) => Err(error),
        };
        stop.store(true, Ordering::Release);
        for thread in running {
            // A signal that comes before KVM is entered is lost, so there is another.
            while !thread.is_finished() {
                let _gone = thread.kill(SIGRTMIN());
                thread::sleep(BETWEEN_SIGNALS);
            }
            if let Ok(processor) = thread.join() {
                self.processors.push(processor);
            }
        }
        // What else was asked for on the way has been done, or is moot.
        while self.events.try_recv().is_ok() {}
        outcome
    }
}

/// Waits for what ends a run.
pub(crate) fn wait(events: &Receiver<Event>, notices: &Notices) -> ControlFlow<Ended> {
    loop {
        return match events.recv() {
            Ok(Event::Asked(Request::Reset)) => ControlFlow::Continue(()),
            Ok(Event::Asked(Request::PowerOff)) => ControlFlow::Break(Ended::PoweredOff),
            Ok(Event::Asked(Request::Panicked)) => ControlFlow::Break(Ended::Panicked),
            // A triple fault is the oldest way to reset a PC, and may be a crash.
            Ok(Event::Stopped(processor, Stop::Shutdown)) => {
                let what = "is reset by a triple fault, or by INIT";
                let whose = format_args!("processor {processor}");
                notices.note("the machine", what, &whose);
                ControlFlow::Continue(())
            }
            Ok(Event::Stopped(processor, Stop::Failed(why))) => {
                ControlFlow::Break(Ended::Failed { processor, why })
            }
            Ok(Event::SlotsLost(why)) => ControlFlow::Break(Ended::SlotsLost { why }),
            Ok(Event::Stopped(_, Stop::Told)) => continue,
            // The machine itself holds a sender.
            Ok(Event::Told) | Err(_) => ControlFlow::Break(Ended::Told),
        };
    }
}

/// How the machine has ended, when a run has ended like this and the functions are reset; none if it
/// begins again. What the events said in the meantime was not heard.
pub(crate) fn again(run: ControlFlow<Ended>, told: bool, slots_lost: &SlotsLost) -> Option<Ended> {
    match run {
        ControlFlow::Break(ended) => Some(ended),
        ControlFlow::Continue(()) if told => Some(Ended::Told),
        ControlFlow::Continue(()) => slots_lost.ended(),
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("processors", &self.processors.len())
            .field("hardware", &self.hardware)
            .field("layout", &self.layout)
            .field("slots", &self.slots.id())
            .finish_non_exhaustive()
    }
}

/// Starts the thread of a processor, which gives it back when it stops.
fn start(
    number: usize,
    mut processor: Processor,
    hardware: Arc<Hardware>,
    events: Sender<Event>,
    stop: Arc<AtomicBool>,
) -> io::Result<JoinHandle<Processor>> {
    thread::Builder::new()
        .name(format!("cpu {number}"))
        .spawn(move || {
            let run = AssertUnwindSafe(|| processor.run(&*hardware, &stop));
            // A mistake of ours ends the machine in order, with its devices quiet.
            let stopped = catch_unwind(run).unwrap_or_else(|_| {
                let why = "its thread panicked, which is a bug in this program: please report it";
                Stop::Failed(why.to_owned())
            });
            // Nobody listens when the machine has been told to end.
            let _unheard = events.send(Event::Stopped(number, stopped));
            processor
        })
}
