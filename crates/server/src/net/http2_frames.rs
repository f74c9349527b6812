//! The frames of HTTP/2 (RFC 9113, section 4.1), followed to know whether a head or frame is incomplete. `timeouts` passes
//! every byte that arrives through here. It must never keep, change or refuse a byte: hyper alone judges the frames.

/// The sizes of the connection preface and of a frame's header (RFC 9113).
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;

/// The relevant frame types of HTTP/2, and the flag that ends a head.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Follows HTTP/2 frames, to know whether a frame, or a head of several frames, is incomplete.
#[derive(Default)]
pub(super) struct Frames {
    /// Bytes of the preface received so far.
    preface: usize,
    header: [u8; FRAME_HEADER_BYTES],
    header_bytes: usize,
    /// Bytes of the frame's payload not yet received.
    payload_left: usize,
    /// True while a head needs further frames.
    is_amid_head: bool,
    /// Bytes of the head or frame so far.
    pub(super) bytes: usize,
    /// The number of complete frames, where a head of several frames counts as one.
    pub(super) complete: usize,
}

impl Frames {
    /// Follows the bytes that arrived.
    pub(super) fn take(&mut self, mut arrived: &[u8]) {
        let preface = arrived.len().min(PREFACE_BYTES - self.preface);
        self.preface += preface;
        arrived = &arrived[preface..];
        while !arrived.is_empty() {
            if self.header_bytes < FRAME_HEADER_BYTES {
                let taken = arrived.len().min(FRAME_HEADER_BYTES - self.header_bytes);
                let until = self.header_bytes + taken;
                self.header[self.header_bytes..until].copy_from_slice(&arrived[..taken]);
                self.header_bytes = until;
                self.bytes += taken;
                arrived = &arrived[taken..];
                if until < FRAME_HEADER_BYTES {
                    return;
                }
                let [high, middle, low, ..] = self.header;
                self.payload_left =
                    usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            }
            let taken = arrived.len().min(self.payload_left);
            self.payload_left -= taken;
            self.bytes += taken;
            arrived = &arrived[taken..];
            if self.payload_left == 0 {
                self.end_frame();
            }
        }
    }

    fn end_frame(&mut self) {
        let [_, _, _, kind, flags, ..] = self.header;
        self.header_bytes = 0;
        self.is_amid_head = matches!(kind, HEADERS | CONTINUATION) && flags & END_HEADERS == 0;
        if !self.is_amid_head {
            self.bytes = 0;
            self.complete += 1;
        }
    }

    /// True if something has begun that must be completed soon. The payload of a body does not count: handlers limit
    /// its time.
    pub(super) fn is_incomplete(&self) -> bool {
        let is_amid_frame = self.header_bytes > 0
            && !(self.header_bytes == FRAME_HEADER_BYTES && self.header[3] == DATA);
        self.is_amid_head || is_amid_frame || (1..PREFACE_BYTES).contains(&self.preface)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, 1], payload].concat()
    }

    #[test]
    fn what_is_incomplete_in_http_2() {
        const SETTINGS: u8 = 4;
        for (sent, is_incomplete) in [
            (frame(SETTINGS, 0, b""), false),
            (frame(SETTINGS, 0, b"123456"), false),
            (frame(HEADERS, END_HEADERS, b"abc"), false),
            (frame(HEADERS, 0, b"abc"), true),
            ([frame(HEADERS, 0, b"abc"), frame(CONTINUATION, 0, b"")].concat(), true),
            ([frame(HEADERS, 0, b"a"), frame(CONTINUATION, END_HEADERS, b"b")].concat(), false),
            (frame(HEADERS, END_HEADERS, b"abc")[..11].to_vec(), true),
            (frame(SETTINGS, 0, b"123456")[..3].to_vec(), true),
            // A body that is arriving.
            (frame(DATA, 0, b"123456")[..12].to_vec(), false),
        ] {
            let stream = [&[b'P'; PREFACE_BYTES][..], &sent].concat();
            // The result does not depend on how the bytes are split.
            for piece in [1, 2, 7, stream.len()] {
                let mut frames = Frames::default();
                for bytes in stream.chunks(piece) {
                    frames.take(bytes);
                }
                assert_eq!(frames.is_incomplete(), is_incomplete, "{sent:?} by {piece}");
                assert_eq!(frames.complete == 0, is_incomplete || sent[3] == DATA, "{sent:?}");
            }
        }
        let mut frames = Frames::default();
        assert!(!frames.is_incomplete());
        frames.take(b"PRI");
        assert!(frames.is_incomplete());
    }
}
