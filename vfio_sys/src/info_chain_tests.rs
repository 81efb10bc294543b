use proptest::prelude::*;

use super::*;

const LAYOUT: InfoLayout = InfoLayout {
    fixed: 24,
    chain_flag: 2,
    cap_offset: 16,
};

/// An answer that announces a chain at `first`, with capabilities (offset, id, version, next).
fn answer(length: usize, first: u32, capabilities: &[(usize, u16, u16, u32)]) -> InfoBuffer {
    let mut buffer = InfoBuffer::zeroed(length);
    buffer.set_u32(FLAGS, 2);
    buffer.set_u32(16, first);
    for (offset, id, version, next) in capabilities {
        buffer.bytes[*offset..offset + 2].copy_from_slice(&id.to_ne_bytes());
        buffer.bytes[offset + 2..offset + 4].copy_from_slice(&version.to_ne_bytes());
        buffer.set_u32(offset + 4, *next);
    }
    buffer
}

fn ids(buffer: &InfoBuffer) -> Result<Vec<u16>, ChainError> {
    let found = buffer.capabilities(LAYOUT)?;
    Ok(found.iter().map(|capability| capability.id).collect())
}

#[test]
fn a_chain_is_followed_in_its_own_order() {
    let buffer = answer(64, 40, &[(40, 3, 1, 24), (24, 1, 1, 0)]);
    assert_eq!(ids(&buffer), Ok(vec![3, 1]));
}

#[test]
fn without_the_flag_there_is_no_chain() {
    let mut buffer = answer(64, 24, &[(24, 1, 1, 0)]);
    buffer.set_u32(FLAGS, 1);
    assert_eq!(ids(&buffer), Ok(vec![]));
    assert_eq!(ids(&answer(64, 0, &[])), Ok(vec![]), "nor at offset zero");
}

#[test]
fn a_truncated_chain_is_an_error() {
    // The last four bytes of the header are missing.
    assert_eq!(
        ids(&answer(28, 24, &[])),
        Err(ChainError::Truncated {
            offset: 24,
            length: 28
        })
    );
    for beyond in [64, 0xffff_fffc] {
        assert_eq!(
            ids(&answer(64, 24, &[(24, 1, 1, beyond)])),
            Err(ChainError::Truncated {
                offset: beyond.into(),
                length: 64
            })
        );
    }
}

#[test]
fn a_cyclic_chain_is_an_error_and_no_loop() {
    assert_eq!(
        ids(&answer(64, 24, &[(24, 1, 1, 24)])),
        Err(ChainError::Cyclic { offset: 24 })
    );
    assert_eq!(
        ids(&answer(64, 24, &[(24, 1, 1, 32), (32, 2, 1, 24)])),
        Err(ChainError::Cyclic { offset: 24 })
    );
}

#[test]
fn a_misaligned_chain_is_an_error() {
    assert_eq!(
        ids(&answer(64, 25, &[])),
        Err(ChainError::Misaligned { offset: 25 })
    );
    assert_eq!(
        ids(&answer(64, 24, &[(24, 1, 1, 34)])),
        Err(ChainError::Misaligned { offset: 34 })
    );
}

#[test]
fn a_chain_into_the_struct_itself_is_an_error() {
    assert_eq!(
        ids(&answer(64, 8, &[])),
        Err(ChainError::InsideStruct {
            offset: 8,
            fixed: 24
        })
    );
}

#[test]
fn pairs_that_are_not_all_there_are_an_error() {
    let buffer = answer(24 + 16 + 32, 24, &[(24, 1, 1, 0)]);
    let capability = buffer.capabilities(LAYOUT).unwrap()[0];
    assert_eq!(capability.pairs(16, 2).unwrap().count(), 2);
    for count in [3, u32::MAX] {
        assert!(matches!(
            capability.pairs(16, count).map(drop),
            Err(ChainError::Truncated { .. })
        ));
    }
    assert!(capability.u32(48 - 4).is_ok());
    assert!(capability.u32(48 - 3).is_err());
    assert!(capability.u32(usize::MAX).is_err());
}

/// A kernel that has `full` bytes to tell and plays the two-call game.
fn kernel(full: usize) -> impl FnMut(&mut InfoBuffer) -> io::Result<()> {
    move |buffer| {
        let _ = buffer.as_mut_ptr();
        let given = usize::try_from(buffer.u32(0)).unwrap();
        assert_eq!(given, buffer.bytes.len());
        buffer.set_u32(FLAGS, 2);
        if given < full {
            buffer.set_u32(0, u32::try_from(full).unwrap());
            buffer.set_u32(16, 0);
        } else {
            buffer.set_u32(16, 24);
            buffer.set_u32(24, 1 | 1 << 16);
            buffer.set_u32(28, 0);
        }
        Ok(())
    }
}

#[test]
fn a_longer_answer_is_asked_for_again() {
    let buffer = InfoBuffer::fetch(LAYOUT, None, kernel(120)).unwrap();
    assert_eq!(buffer.bytes.len(), 120);
    assert_eq!(buffer.capabilities(LAYOUT).unwrap()[0].id, 1);
}

#[test]
fn the_index_is_set_on_every_call() {
    let mut inner = kernel(120);
    let mut calls = 0;
    InfoBuffer::fetch(LAYOUT, Some((8, 7)), |buffer| {
        calls += 1;
        assert_eq!(buffer.u32(8), 7);
        inner(buffer)
    })
    .unwrap();
    assert_eq!(calls, 2);
}

#[test]
fn a_kernel_that_always_wants_more_is_given_up() {
    let mut full = 100;
    let result = InfoBuffer::fetch(LAYOUT, None, |buffer| {
        full += 100;
        kernel(full)(buffer)
    });
    assert!(matches!(result, Err(InfoError::TooLong { .. })));
    let result = InfoBuffer::fetch(LAYOUT, None, kernel(0x8000_0000));
    assert!(matches!(
        result,
        Err(InfoError::TooLong {
            wanted: 0x8000_0000,
            ..
        })
    ));
}

#[test]
fn the_errno_survives() {
    let refuse = |_: &mut InfoBuffer| Err(io::Error::from_raw_os_error(libc::ENOTTY));
    let error = InfoBuffer::fetch(LAYOUT, None, refuse).unwrap_err();
    assert_eq!(io::Error::from(error).raw_os_error(), Some(libc::ENOTTY));
    let malformed = InfoError::Chain(ChainError::Misaligned { offset: 3 });
    assert_eq!(io::Error::from(malformed).raw_os_error(), None);
}

proptest! {
    #[test]
    fn random_bytes_never_panic_nor_loop(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let _ = ids(&InfoBuffer::of_bytes(bytes));
    }

    /// Random bytes hardly ever begin a chain, so here are ones that do, with small offsets.
    #[test]
    fn random_chains_never_panic_nor_loop(
        length in 0usize..256,
        first in 0u32..300,
        words in prop::collection::vec(0u32..300, 64),
        count: u32,
        at in 0usize..300,
    ) {
        let mut buffer = InfoBuffer::zeroed(length);
        for (index, word) in words.iter().enumerate() {
            buffer.set_u32(index * 4, *word);
        }
        buffer.set_u32(FLAGS, 2);
        buffer.set_u32(16, first);
        if let Ok(found) = buffer.capabilities(LAYOUT) {
            prop_assert!(found.len() <= length / 4);
            for capability in found {
                let _ = capability.check_version();
                let _ = capability.u32(at);
                let _ = capability.pairs(at, count).map(Iterator::count);
            }
        }
    }
}
