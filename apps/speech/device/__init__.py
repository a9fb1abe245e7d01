"""What runs an exported student where people speak: no torch in any of it."""
