"""What trains from a mixture, and how a mixture is trained."""
