"""The main job on two small data sets, as `streaming-polyak demo` runs it; needs the extra "demo"."""
