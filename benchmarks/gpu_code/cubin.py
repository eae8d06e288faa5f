"""What is read from a cubin, which is an ELF file, without a tool that would print all of it."""

import struct

_FUNCTION = 2  # STT_FUNC
_MAX_THREADS = 0x05  # EIATTR_MAX_THREADS
_HAS_SIZE = 4  # EIFMT_SVAL: so many bytes follow


class Cubin:
    """Attributes:
    indices: of its kernels in the table of symbols, by symbol, as nvdisasm's option takes them.
    has_lines: whether it tells the lines of the source that instructions come from.
    max_threads: the most threads of a block for which each kernel is compiled, by symbol.
    """

    def __init__(self, content: bytes):
        (table,) = struct.unpack_from("<Q", content, 0x28)
        size, count, of_names = struct.unpack_from("<3H", content, 0x3A)
        headers = [
            struct.unpack_from("<2I4Q2I", content, table + i * size) for i in range(count)
        ]  # name, type, flags, address, offset, size, link, info
        begins = headers[of_names][4]
        sections = {_text(content, begins + header[0]): header for header in headers}

        self.has_lines = ".debug_line" in sections
        self.indices: dict[str, int] = {}
        _, _, _, _, offset, size, of_names, _ = sections[".symtab"]
        begins = headers[of_names][4]
        for i in range(size // 24):
            name, info = struct.unpack_from("<IB", content, offset + 24 * i)
            symbol = _text(content, begins + name)
            if info & 15 == _FUNCTION and f".text.{symbol}" in sections:
                self.indices[symbol] = i

        self.max_threads: dict[str, int] = {}
        for symbol in self.indices:
            _, _, _, _, offset, size, _, _ = sections[f".nv.info.{symbol}"]
            end = offset + size
            while offset < end:
                kind, attribute, value = struct.unpack_from("<BBH", content, offset)
                offset += 4
                if attribute == _MAX_THREADS:  # of three dimensions
                    (self.max_threads[symbol],) = struct.unpack_from("<I", content, offset)
                offset += value if kind == _HAS_SIZE else 0


def _text(content: bytes, begin: int) -> str:
    return content[begin : content.index(0, begin)].decode()
