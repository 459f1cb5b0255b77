"""Published weights, read and written in the formats of their authors."""
