"""What the engine does differently on one platform than on another: one value, chosen once."""

from folojax.backend.backend import Backend, choose_backend

__all__ = ["Backend", "choose_backend"]
