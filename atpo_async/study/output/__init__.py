"""What a study hands out: tables, figures, pages, and sections of documents."""
