"""`/v1/files` and `/v1/batches` in OpenAI's shapes: files are the gateway's, batches are asked of their service."""
