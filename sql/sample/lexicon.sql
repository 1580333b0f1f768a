-- Terms and definitions of the worked example.
CREATE TABLE lexicon (
    term_id    text PRIMARY KEY,
    term       text NOT NULL,
    definition text NOT NULL,
    field      text NOT NULL
);
