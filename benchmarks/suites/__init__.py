"""What is measured, a file each; every suite is ``jobs(device, quick) -> list of Job``."""
