"""Decodes, renders and measures images with Pillow: bytes in, values out, no network, no stores."""
