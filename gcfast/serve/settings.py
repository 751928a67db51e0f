"""What a server takes at most, and how it forms batches."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from gcfast._checks import require_int
from gcfast.images.decode import Limits

# Those that browsers show, and TIFF; Pillow's readers of anything else stay out of reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")

# "*" is any, "*.shop.example" any that ends so; addresses of IPv6 stand in brackets, as in a URL.
_NAME = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*\.?|\[[0-9a-f:.]+\]", re.IGNORECASE)


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server, and how it forms batches.

    Attributes:
        batch_size: pictures that go through the model at once, at most.
        wait: seconds that the first picture of a batch waits for others.
        queue: requests that are being answered at once; one more gets status 503.
        timeout: seconds that a request may take to come in (408), and then to be answered (504).
        max_bytes: of a request; for JSON after base64 is taken off, a third more before.
        max_pixels: of a picture, checked before any is decoded.
        decoders: threads that decode pictures and encode answers.
        center: as for :meth:`gcfast.Explainer.explain_batch`.
        watch: seconds between looks at the database's manifest; 0 for none: then SIGHUP alone.
        hosts: names that a request may be addressed to, "*.shop.example" for all that end so; empty
            for any.

    Raises:
        TypeError, ValueError: a setting of the wrong kind or out of range.
    """

    batch_size: int = 32
    wait: float = 0.005
    queue: int = 128
    timeout: float = 30.0
    max_bytes: int = 16 * 2**20
    max_pixels: int = 40_000_000
    decoders: int = 2
    center: float = 0.0
    watch: float = 1.0
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                require_int(field.name, value, 1)
            elif field.type == "float":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise TypeError(f"`{field.name}` must be a number, got {value!r}")
                if not math.isfinite(value):
                    raise ValueError(f"`{field.name}` must be finite, got {value}")
        for name in ("wait", "watch"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}")
        if isinstance(self.hosts, str):
            raise TypeError(f"`hosts` must be a tuple of names, got {self.hosts!r}")
        for host in self.hosts:
            if not isinstance(host, str) or not _NAME.fullmatch(host):
                raise ValueError(
                    "`hosts` must be names without scheme, port and path, addresses of IPv6 in "
                    f"brackets, got {host!r}"
                )
        if self.timeout <= 0:
            raise ValueError(f"`timeout` must be above 0, got {self.timeout}")

    @property
    def limits(self) -> Limits:
        """Of a picture that came with a request."""
        return Limits(FORMATS, self.max_pixels)
