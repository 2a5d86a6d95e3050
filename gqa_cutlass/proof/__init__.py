"""Is it right? The reference and the error rule, and what applies them: sim, verify, evidence."""
