"""her-digits: a Flower / PEFT app."""
