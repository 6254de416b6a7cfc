"""What is measured against peers and limits; each file is a command, see CONTRIBUTING.md."""
