"""Quick plots on a terminal, of block and braille characters: they need no colours."""
