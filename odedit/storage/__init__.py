"""Files on disk or at an address, written whole or not at all."""
