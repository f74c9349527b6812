//! `pisync openapi`: prints the API's document, as `docs/openapi.json` holds it. It reads no setting.

use super::exit::Failure;

pub(super) fn run() -> Result<(), Failure> {
    print!("{}", crate::api::openapi_json()?);
    Ok(())
}
