"""What a layout needs and how fast it goes, before it is paid for. Nothing here imports torch."""
