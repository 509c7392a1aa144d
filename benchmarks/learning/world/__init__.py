"""The small world: a decoder trained here, and the paper's claims decided with many seeds."""
