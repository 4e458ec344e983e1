//! ROC and precision-recall curves of several detectors, as SVG.
//!
//! The false-positive rate is drawn on a logarithmic scale from one false positive among the test normals:
//! an inline detector works at 1 % and below, which is a line's width on a linear scale.
//!
//! Cost: about 100 KB a plot; points that would fall on one another are left out.

use std::io;
use std::path::{Path, PathBuf};

use plotters::prelude::{
    BLACK, ChartBuilder, Color, IntoDrawingArea, LineSeries, Palette, Palette99, PathElement, SVGBackend,
    SeriesLabelPosition, WHITE,
};

use super::figures::Ranked;

const SIZE: (u32, u32) = (720, 540);
/// Points nearer than this in both directions (of 1, or of a decade) are one.
const RESOLUTION: f64 = 0.002;

/// What one of the two plots differs in.
struct Plot {
    title: &'static str,
    x_title: &'static str,
    y_title: &'static str,
    /// Left end of the x axis; the right one is that of 1.
    x_from: f64,
    x_to: f64,
    x_label: fn(&f64) -> String,
    legend: SeriesLabelPosition,
}

/// Draws `DIR/STEM.roc.svg` and `DIR/STEM.pr.svg`.
pub(crate) fn draw(
    directory: &Path,
    stem: &str,
    curves: &[(&'static str, Ranked)],
) -> io::Result<[PathBuf; 2]> {
    std::fs::create_dir_all(directory)?;
    let curves: Vec<(&'static str, Vec<[f64; 3]>)> =
        curves.iter().map(|(name, ranked)| (*name, ranked.curve())).collect();
    let one_false_positive = curves
        .iter()
        .filter_map(|(_, curve)| curve.iter().map(|point| point[0]).find(|rate| *rate > 0.0))
        .fold(0.1, f64::min);
    let roc_plot = Plot {
        title: "detection by share of false positives",
        x_title: "false-positive rate (log)",
        y_title: "true-positive rate",
        x_from: one_false_positive.log10(),
        x_to: 0.0,
        x_label: |x| format!("{:.2} %", 100.0 * 10f64.powf(*x)),
        legend: SeriesLabelPosition::LowerRight,
    };
    let recall_plot = Plot {
        title: "precision by recall",
        x_title: "recall",
        y_title: "precision",
        x_from: 0.0,
        x_to: 1.0,
        x_label: |x| format!("{x:.1}"),
        legend: SeriesLabelPosition::LowerLeft,
    };
    let roc = |p: &[f64; 3]| (p[0].max(one_false_positive).log10(), p[1]);
    let recall = |p: &[f64; 3]| (p[1], p[2]);
    let roc_path = directory.join(format!("{stem}.roc.svg"));
    plot(
        &roc_path,
        stem,
        &roc_plot,
        curves.iter().map(|(name, curve)| (*name, thinned(curve.iter().map(roc)))),
    )?;
    let recall_path = directory.join(format!("{stem}.pr.svg"));
    plot(
        &recall_path,
        stem,
        &recall_plot,
        curves.iter().map(|(name, curve)| (*name, thinned(curve.iter().map(recall)))),
    )?;
    Ok([roc_path, recall_path])
}

fn plot(
    path: &Path,
    stem: &str,
    plot: &Plot,
    curves: impl Iterator<Item = (&'static str, Vec<(f64, f64)>)>,
) -> io::Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(io::Error::other)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{stem}: {}", plot.title), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d(plot.x_from..plot.x_to, 0.0..1.0)
        .map_err(io::Error::other)?;
    chart
        .configure_mesh()
        .x_desc(plot.x_title)
        .y_desc(plot.y_title)
        .x_label_formatter(&plot.x_label)
        .draw()
        .map_err(io::Error::other)?;
    for (at, (name, points)) in curves.enumerate() {
        let line = Palette99::pick(at).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points, line))
            .map_err(io::Error::other)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], line));
    }
    chart
        .configure_series_labels()
        .position(plot.legend.clone())
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
        .map_err(io::Error::other)?;
    area.present().map_err(io::Error::other)
}

/// Without the points that could not be told from the one before; the last stays.
fn thinned(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.collect();
    let mut kept: Vec<(f64, f64)> = Vec::new();
    for (at, &(x, y)) in points.iter().enumerate() {
        let near = kept.last().is_some_and(|&(kept_x, kept_y)| {
            (x - kept_x).abs() < RESOLUTION && (y - kept_y).abs() < RESOLUTION
        });
        if !near || at + 1 == points.len() {
            kept.push((x, y));
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_plots_name_every_detector() {
        let directory = tempfile::tempdir().unwrap();
        let normals: Vec<i64> = (0..2000).collect();
        let attacks: Vec<i64> = (0..500).map(|i| 1500 + 3 * i).collect();
        let curves =
            [("context", Ranked::new(&normals, &attacks)), ("zstd", Ranked::new(&attacks, &normals))];
        for path in draw(directory.path(), "some set", &curves).unwrap() {
            let svg = std::fs::read_to_string(&path).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.matches("<polyline").count() >= 2, "{}", path.display());
            for text in ["context", "zstd", "some set"] {
                assert!(svg.contains(text), "{text} in {}", path.display());
            }
            assert!(svg.len() < 400_000, "{} bytes", svg.len());
        }
    }

    #[test]
    fn thinning_keeps_the_ends() {
        let points: Vec<(f64, f64)> =
            (0..=10_000).map(|i| (f64::from(i) / 1e4, f64::from(i) / 1e4)).collect();
        let kept = thinned(points.iter().copied());
        assert!(kept.len() < 600);
        assert_eq!((kept.first(), kept.last()), (points.first(), points.last()));
    }
}
