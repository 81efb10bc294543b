//! Registers of config space that this crate emulates: bytes, and which of their bits the guest
//! can write.

/// How many bytes there are of an emulated function: all of PCI Express's config space.
const SIZE: usize = 0x1000;

/// One function's registers.
#[derive(Debug, Clone)]
pub(super) struct Header {
    bytes: Vec<u8>,
    writable: Vec<u8>,
}

impl Header {
    /// All zero, and nothing writable.
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; SIZE],
            writable: vec![0; SIZE],
        }
    }

    /// Sets bytes from `at` on. What does not fit is left out.
    pub(super) fn set(&mut self, at: u16, value: &[u8]) {
        let places = self.bytes.iter_mut().skip(at.into());
        for (place, byte) in places.zip(value) {
            *place = *byte;
        }
    }

    /// Lets the guest write the bits of `mask` from `at` on.
    pub(super) fn allow(&mut self, at: u16, mask: &[u8]) {
        let places = self.writable.iter_mut().skip(at.into());
        for (place, bits) in places.zip(mask) {
            *place = *bits;
        }
    }

    /// One byte; zero past the end.
    pub(super) fn byte(&self, at: u16) -> u8 {
        self.bytes.get(usize::from(at)).copied().unwrap_or(0)
    }

    /// Reads bytes; zero past the end.
    pub(super) fn read(&self, at: u16, data: &mut [u8]) {
        data.fill(0);
        for (place, byte) in data.iter_mut().zip(self.bytes.iter().skip(at.into())) {
            *place = *byte;
        }
    }

    /// The guest writes bytes.
    pub(super) fn write(&mut self, at: u16, data: &[u8]) {
        let places = self.bytes.iter_mut().zip(&self.writable).skip(at.into());
        for ((place, writable), byte) in places.zip(data) {
            *place = *place & !writable | byte & writable;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_bits_change_and_nothing_is_past_the_end() {
        let mut header = Header::new();
        header.set(4, &[0xf0, 0x0f]);
        header.allow(4, &[0x03]);
        header.write(4, &[0xff, 0xff]);
        let mut read = [0; 2];
        header.read(4, &mut read);
        assert_eq!(read, [0xf3, 0x0f]);
        header.write(0xfff, &[1, 2, 3, 4]);
        let mut past = [0xaa; 4];
        header.read(0xfff, &mut past);
        assert_eq!(past, [0; 4]);
    }
}
