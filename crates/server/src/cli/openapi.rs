//! `pisync openapi`: the API's document, as `docs/openapi.json` holds it.

use super::exit::Failure;

pub(super) fn run() -> Result<(), Failure> {
    print!("{}", crate::api::openapi_json()?);
    Ok(())
}
