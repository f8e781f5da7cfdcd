"""Who decides what is warm and active where: ours, and what it is compared with."""
