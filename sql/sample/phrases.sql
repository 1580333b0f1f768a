-- Short bilingual pairs of the worked example.
CREATE TABLE phrases (
    id      uuid PRIMARY KEY,
    english text NOT NULL,
    spanish text NOT NULL,
    topic   text NOT NULL
);
