"""What runs inside the containers beside the services: the health probe and the demo's set-up."""
