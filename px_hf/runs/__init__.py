"""What the commands share: arguments, the backbone, the output folder, the console, fine-tuning, tasks and models."""
