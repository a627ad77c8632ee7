"""What touches RecBole's insides: repairs on current libraries, and how its settings are read and checked."""
