//! Drivers for DMA engines that prove by bytes who reaches whom.
