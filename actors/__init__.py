"""Where state lives: shards on Ray, the links to them, the journal, deadlines and recovery."""
