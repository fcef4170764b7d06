"""From files to images in memory: fetched, checked, unpacked, decoded once and kept."""
