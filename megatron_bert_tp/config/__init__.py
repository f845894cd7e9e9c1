"""Settings: their schema, strict reading, checking, help; without torch, so that it answers at once."""
