"""Bytes in, values out: decoding, rendering and measuring images with Pillow. No network, no stores."""
