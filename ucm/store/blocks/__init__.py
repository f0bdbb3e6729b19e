"""What a block is called, and how its bytes lie. Pure, and held by golden vectors."""
