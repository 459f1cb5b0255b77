"""What evaluate is made of: what it reads and draws, what it asks on scenes, and its pages."""
